"""Budgets are positive numbers, whoever sets them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from cake_hf.arithmetic.limits import Limits

NAMES = [field.name for field in dataclasses.fields(Limits)]


def test_the_defaults_are_valid_and_there_are_some() -> None:
    limits = Limits()
    assert NAMES
    assert all(getattr(limits, name) > 0 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan])
def test_a_budget_that_is_not_positive_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{name} must be positive, got {value}"):
        Limits(**{name: value})


@pytest.mark.parametrize("name", NAMES)
def test_budgets_do_not_change_under_a_running_restore(name: str) -> None:
    limits = Limits(**{name: 3})
    assert getattr(limits, name) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(limits, name, 4)
