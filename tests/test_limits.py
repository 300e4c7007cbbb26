"""Budgets are positive numbers, and one may be 0."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cake_hf import Limits
from cake_hf.util.environment import limit_variable

NAMES = [field.name for field in dataclasses.fields(Limits)]
MAY_BE_ZERO = "device_decode_bytes"


def test_the_defaults_are_valid_and_there_are_some() -> None:
    limits = Limits()
    assert NAMES
    assert all(getattr(limits, name) > 0 for name in NAMES if name != MAY_BE_ZERO)
    assert getattr(limits, MAY_BE_ZERO) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan])
def test_a_budget_that_is_not_positive_is_refused_by_name(name: str, value: float) -> None:
    if (name, value) == (MAY_BE_ZERO, 0):
        assert getattr(Limits(**{name: value}), name) == 0
        return
    with pytest.raises(ValueError, match=rf"Limits\.{name} must be (0 or )?positive, got {value}"):
        Limits(**{name: value})


SECONDS = [name for name in NAMES if name.endswith(("timeout", "seconds"))]
NO_BUDGETS = [math.inf, True, False, "10", b"10", None, [], 1e300, 10**400, 2**63, np.bool_(True), 1j, "9" * 5000]


@pytest.mark.fault(
    "Time and bounds",
    "A limit is no sensible number: infinite, a bool, a string, a fraction of a thread, a number beyond all machines.",
    "`Limits` refuses it, with one sentence that names the field and the right form.",
)
@pytest.mark.parametrize("value", NO_BUDGETS, ids=lambda value: str(type(value).__name__))
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_budget_is_refused_by_name_and_in_one_sentence(name: str, value: Any) -> None:
    form = "a number of seconds, such as" if name in SECONDS else "a whole number, such as"
    if name not in SECONDS and isinstance(value, int) and value < 2**62:
        value = float(value)
    if value in (0.0, False) and not isinstance(value, bool) and name != MAY_BE_ZERO:
        form = "positive"
    with pytest.raises(ValueError, match=rf"^Limits\.{name} must be {form}[^\n]*\.$") as caught:
        Limits(**{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", sorted({*NAMES} - {*SECONDS}))
@pytest.mark.parametrize("value", [2.0, 2.5, np.float32(2)])
def test_what_is_counted_is_whole(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{name} must be a whole number, such as"):
        Limits(**{name: value})
    assert type(getattr(Limits(**{name: np.int64(2)}), name)) is int


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [1, 0.001, 10**9, np.float32(2.5), Fraction(1, 2)])
def test_seconds_may_be_any_real_number(name: str, value: Any) -> None:
    assert getattr(Limits(**{name: value}), name) == float(value)


@pytest.mark.parametrize("text", ["9" * 400, "99999999999999999999h", "9" * 400 + "GB"])
@pytest.mark.parametrize("name", NAMES)
def test_a_variable_that_is_no_budget_is_named(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limit_variable(name), text)
    with pytest.raises(ValueError, match=f"^{limit_variable(name)} cannot be used: "):
        Limits.from_environment()


@pytest.mark.parametrize("name", NAMES)
def test_budgets_do_not_change_under_a_running_restore(name: str) -> None:
    limits = Limits(**{name: 3})
    assert getattr(limits, name) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(limits, name, 4)
