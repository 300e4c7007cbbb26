"""Tools for testing a store of your own: the contract as tests, and stores that are slow, broken or gated.

    from cake_hf.testing import StoreContract

    class TestMyStore(StoreContract):
        def make_store(self, tmp_path):
            return MyStore(...)

The contract needs `pip install "cake-hf[test]"`; it is imported on first access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cake_hf.scheduling.pace import RestorePace, Rules
from cake_hf.stores.wrappers import WrapperStore
from cake_hf.testing.wrappers import FAULTS, FaultStore, GateStore, ThrottledStore, expected_faults

if TYPE_CHECKING:
    from cake_hf.testing.contract import StoreContract, check_against_dict
    from cake_hf.testing.read_only import ReadOnlyContract

__all__ = [
    "FAULTS",
    "FaultStore",
    "GateStore",
    "ReadOnlyContract",
    "RestorePace",
    "Rules",
    "StoreContract",
    "ThrottledStore",
    "WrapperStore",
    "check_against_dict",
    "expected_faults",
]


def __getattr__(name: str) -> Any:
    """Imports the contracts on demand: only they need pytest and hypothesis, the stores above need neither."""
    if name in ("StoreContract", "check_against_dict"):
        from cake_hf.testing import contract

        return getattr(contract, name)
    if name == "ReadOnlyContract":
        from cake_hf.testing.read_only import ReadOnlyContract

        return ReadOnlyContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
