"""Walking a model gives what torch's iterators give, in their order: the weights' checksum depends on it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from cake_hf.model.foreign_code import attributes_of
from cake_hf.model.look import devices_of, has, modules_of, parameters_of
from models import shared_model


def odd_model() -> torch.nn.Module:
    """With a module and a parameter that several places share, and empty places."""
    model, shared = torch.nn.Sequential(), torch.nn.Linear(2, 3)
    model.add_module("first", shared)
    model.add_module("nothing", None)
    model.add_module("again", torch.nn.Sequential(shared, torch.nn.Linear(3, 2, bias=False)))
    model.register_parameter("none", None)
    model.register_parameter("tied", shared.weight)
    return model


def test_modules_and_parameters_come_in_torchs_order() -> None:
    for model in (odd_model(), shared_model("llama"), torch.nn.Linear(1, 1)):
        assert modules_of(model) == list(model.named_modules())
        found, theirs = list(parameters_of(model)), list(model.named_parameters(remove_duplicate=False))
        assert [name for name, _ in found] == [name for name, _ in theirs]
        assert all(one is other for (_, one), (_, other) in zip(found, theirs, strict=True))


def test_a_model_that_was_walked_waits_for_no_collector() -> None:
    model = odd_model()
    gone = weakref.ref(model[0])
    gc.collect()
    gc.disable()
    try:
        modules_of(model)
        list(parameters_of(model))
        devices_of(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_has_sees_what_an_instance_and_its_class_have() -> None:
    module = torch.nn.Linear(1, 1)
    module.merged_adapters = []
    assert has(module, "merged_adapters")
    assert has(module, "forward")
    assert not has(module, "active_adapters")


def circle() -> torch.nn.Module:
    """A module that is in itself."""
    model = odd_model()
    model.get_submodule("again").add_module("around", model)
    return model


@pytest.mark.parametrize("make", [odd_model, circle, lambda: shared_model("llama"), lambda: torch.nn.Linear(1, 1)])
def test_attributes_of_each_module(make: Callable[[], torch.nn.Module]) -> None:
    model = make()
    found = {id(attributes) for attributes in attributes_of(model)}
    assert found == {id(vars(module)) for module in model.modules()}
