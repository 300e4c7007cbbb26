"""The Mooncake store: its URL here, and all that needs a cluster in `mooncake_suite.py`, in a network of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.servers.own_network import NAMESPACES, obstacle
from cake_hf import StoreError
from cake_hf.stores import mooncake_client
from cake_hf.stores.mooncake import MooncakeStore
from cake_hf.stores.mooncake_client import Member, MooncakeAddress

HERE = Path(__file__).parent
SUITE_SECONDS = 580
SUITE_TESTS = 79
"""At least so many are in the suite: it must not pass by being empty."""


@pytest.mark.timeout(SUITE_SECONDS + 20)
def test_the_suite_passes_in_a_network_of_its_own(tmp_path: Path) -> None:
    if reason := obstacle():
        if os.environ.get("CAKE_HF_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    arguments = [
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'inside'}",
        str(HERE / "mooncake_suite.py"),
    ]
    command = [*NAMESPACES, sys.executable, str(HERE / "own_network.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent)
    try:
        output, _ = process.communicate(timeout=SUITE_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"The suite did not end in time.\n{output}")
    passed = re.search(r"(\d+) passed", output)
    assert process.returncode == 0, output
    assert passed is not None, output
    assert int(passed[1]) >= SUITE_TESTS, output


# What a URL says.


def test_a_url_is_taken_apart() -> None:
    url = (
        "mooncake://master.example:1234/team/a?lend=4GB&replicas=2&protocol=rdma&devices=mlx5_0&host=10.0.0.7&admin=99"
    )
    address = MooncakeAddress.parse(url)
    assert address.place == "mooncake://master.example:1234/team/a"
    assert (address.prefix, address.replicas) == ("team/a", 2)
    assert address.listing == "http://master.example:99/get_all_keys"
    settings = address.settings
    assert (settings.master, settings.host, settings.lend_bytes) == ("master.example:1234", "10.0.0.7", 4 * 10**9)
    assert (settings.protocol, settings.devices, settings.metadata) == ("rdma", "mlx5_0", "P2PHANDSHAKE")


def test_a_url_may_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    address = MooncakeAddress.parse("mooncake://master")
    assert address.place == "mooncake://master:50051/cake_hf"
    assert MooncakeAddress.parse("mooncake://[::1]/x").listing == "http://[::1]:9003/get_all_keys"
    assert (address.settings.lend_bytes, address.replicas, address.listing) == (0, 1, "http://master:9003/get_all_keys")
    monkeypatch.setitem(sys.modules, "mooncake.store", ModuleType("mooncake.store"))
    assert repr(MooncakeStore("mooncake://master")) == "MooncakeStore('mooncake://master:50051/cake_hf')"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("mooncake://", "it needs a host"),
        ("mooncake://host:port", "its port is a number"),
        ("mooncake://host/a b", "a prefix of letters"),
        ("mooncake://host?lend=lots", "is not a size"),
        ("mooncake://host?replicas=0", "at least one replica"),
        ("mooncake://host?replicas=many", "invalid literal"),
        ("mooncake://host?colour=red", "unknown option 'colour'; known are lend, replicas"),
        ("mooncake://host?protocol=pigeon", "must be one of tcp, rdma"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, what: str) -> None:
    with pytest.raises(StoreError, match=re.escape(what)):
        MooncakeStore(url)


# A membership, without a cluster.


class FakeClient:
    def __init__(self) -> None:
        self.closed = 0

    def setup(self, *settings: object) -> int:
        return 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[FakeClient]:
    made: list[FakeClient] = []

    def new() -> FakeClient:
        made.append(FakeClient())
        return made[-1]

    library = ModuleType("mooncake.store")
    library.MooncakeDistributedStore = new  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake.store", library)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: ThisHost())
    return made


class ThisHost(nullcontext[Any]):
    """A connection to a master, as far as it says which address is ours."""

    def __enter__(self) -> Any:
        return self

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1


def test_stores_with_equal_settings_share_a_client_that_ends_with_the_last(clients: list[FakeClient]) -> None:
    first, second = MooncakeStore("mooncake://host/a"), MooncakeStore("mooncake://host/b")
    other = MooncakeStore("mooncake://host/a?lend=1GB")
    assert clients == []  # opening asks nothing
    for store in (first, second, other):
        with store._member.client():
            pass
    assert len(clients) == 2
    first.close()
    first.close()
    assert clients[0].closed == 0
    second.close()
    assert clients[0].closed == 1
    with pytest.raises(StoreError, match="is closed"), second._member.client():
        pass
    member = other._member
    del other, store
    assert clients[1].closed == 1
    assert member.settings not in mooncake_client._members


def test_a_client_lives_as_long_as_a_call_is_at_work(clients: list[FakeClient]) -> None:
    """A load that was given up may still be in the client when the store is closed; to end it then would end the process."""
    member = Member(MooncakeAddress.parse("mooncake://host").settings)
    with member.client():
        member.retire(seconds=0.01)
        assert clients[0].closed == 0
    assert clients[0].closed == 1


def test_a_missing_package_or_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="mooncake")

    def broken(name: str) -> None:
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    for fake, advice in ((missing, "cake-hf[mooncake]"), (broken, "apt-get install libibverbs1")):
        monkeypatch.setattr(mooncake_client, "import_module", fake)
        with pytest.raises(StoreError, match=re.escape(advice)):
            MooncakeStore("mooncake://127.0.0.1:1")
