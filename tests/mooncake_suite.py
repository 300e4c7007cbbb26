"""The Mooncake store against a real master, with the memory of a second process. Run by `test_mooncake_store.py`."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import test_fault_matrix as matrix
import test_serve_processes as serve
from benchmarks.servers import free_port
from benchmarks.servers.mooncake import Cluster
from cake_hf import CakeCache, Limits, StoreError, TierStore
from cake_hf.stores import LocalStore, MemoryStore, Store, mooncake
from cake_hf.stores.mooncake import MOST_PIECES, MooncakeStore
from cake_hf.stores.mooncake_client import LEASED
from cake_hf.testing import StoreContract, check_against_dict
from cake_hf.testing.contract import PATIENCE, key_of, read_parts, split, value_of
from http_servers import require_server, save_chat_model
from models import CHUNK, CHUNKS, difference, expected, prompt, run, shared_model
from waiting import await_true

LEASE = 0.15
"""Seconds. Every removal of what was just read waits for it."""

READER = """
import hashlib
with MooncakeStore(sys.argv[1]) as store:
    print(hashlib.sha256(store.read(sys.argv[2]) or b"").hexdigest(), store.write(sys.argv[3], [b"from afar"]))
"""

SHORT_LEASE = f"--default_kv_lease_ttl={int(1000 * LEASE)}ms"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), "512MiB", SHORT_LEASE)
    with MooncakeStore(cluster.base()) as member:  # so that the stores of all tests share its client
        member.contains([key_of(0)])
        yield cluster
    cluster.end()


@pytest.fixture(autouse=True)
def patience_with_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer for a read than this short lease, more often than not; no test may fail of that."""
    monkeypatch.setattr(mooncake, "ATTEMPTS", 20)


@pytest.fixture
def store(cluster: Cluster) -> Iterator[MooncakeStore]:
    with MooncakeStore(cluster.new_url()) as store:
        yield store


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One to break."""
    cluster = Cluster(tmp_path, "64MiB", SHORT_LEASE, "--client_ttl=4")
    yield cluster
    cluster.end()


@pytest.fixture
def slow_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One in which leases last, and who lends memory counts as alive, for longer than any test."""
    cluster = Cluster(tmp_path, "64MiB", "--default_kv_lease_ttl=3600000ms", "--client_ttl=3600")
    yield cluster
    cluster.end()


class TestMooncakeStore(StoreContract):
    @pytest.fixture
    def store(self, cluster: Cluster) -> Iterator[Store]:
        self.url = cluster.new_url()
        with MooncakeStore(self.url, lease_seconds=PATIENCE) as store:
            yield store

    def reopen(self, store: Store) -> Store:
        return MooncakeStore(self.url)


@pytest.mark.parametrize(
    "test",
    [
        "test_parts_are_gathered_and_scattered_as_they_are",
        "test_a_value_may_have_thousands_of_parts",
        "test_a_large_value_comes_back",
        "test_threads_write_and_read_keys_of_their_own",
        "test_threads_write_the_same_key",
    ],
)
def test_memory_may_be_registered_before_it_is_used(cluster: Cluster, test: str) -> None:
    """What RDMA needs; over TCP it does no harm."""
    with MooncakeStore(cluster.new_url(), lease_seconds=PATIENCE, register=True) as store:
        getattr(StoreContract(), test)(store)


def test_mooncake_behaves_like_a_dict(cluster: Cluster) -> None:
    """Few steps here, since each removal waits for a lease to end; CAKE_HF_SEQUENCES=90 makes them a thousand."""
    sequences = int(os.environ.get("CAKE_HF_SEQUENCES", "6"))
    make = lambda: MooncakeStore(cluster.new_url())  # noqa: E731
    assert check_against_dict(make, max_examples=sequences, steps=12) >= 10 * sequences


@pytest.mark.parametrize("position", matrix.POSITIONS)
@pytest.mark.parametrize("fault", matrix.COUNTS)
def test_a_fault_changes_nothing_but_the_counts(store: MooncakeStore, fault: str, position: str) -> None:
    """Mooncake's part of the fault matrix."""
    for key, value in matrix.chunks():
        store.write(key, [value])
    matrix.test_a_fault_changes_nothing_but_the_counts(store, fault, position)


def test_the_network_is_our_own() -> None:
    """The negative control: nothing here may be heard outside."""
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


# Values, between processes.


def test_another_process_reads_and_writes(cluster: Cluster) -> None:
    url = cluster.new_url()
    with MooncakeStore(url) as store:
        value = value_of(1, 3_000_000)
        store.write(key_of(1), split(value, [4096, 1_000_000]))
        reader = cluster.start(READER, url, key_of(1), key_of(2))
        answer, _ = reader.communicate(timeout=PATIENCE)
        assert answer.decode().split() == [hashlib.sha256(value).hexdigest(), "True"]
        assert store.read(key_of(2)) == b"from afar"
        assert sorted(store.keys()) == sorted([key_of(1), key_of(2)])


def test_servers_share_prefixes(cluster: Cluster, tmp_path: Path) -> None:
    """Mooncake's part of what two servers of a model give each other."""
    require_server()
    serve.test_servers_share_prefixes_and_a_later_one_goes_on(cluster.new_url(), save_chat_model(tmp_path))


def test_values_beyond_any_slice_come_back(store: MooncakeStore) -> None:
    value = value_of(1, 20 * 2**20 + 1)
    assert store.write(key_of(1), split(value, [2**20, 18 * 2**20])) is True
    assert read_parts(store, key_of(1), [17 * 2**20, 3 * 2**20 + 1]) == value
    assert store.delete(key_of(1)) is True


@pytest.mark.parametrize("pieces", [MOST_PIECES, MOST_PIECES + 1])
def test_many_pieces_come_back(store: MooncakeStore, pieces: int) -> None:
    value = value_of(1, 100 * pieces)
    cuts = range(100, len(value), 100)
    assert store.write(key_of(1), split(value, cuts)) is True
    assert read_parts(store, key_of(1), [100] * pieces) == value
    buffers = [bytearray(90) for _ in range(pieces)]
    assert store.read_range(key_of(1), [memoryview(buffer) for buffer in buffers], 7)
    assert b"".join(buffers) == value[7 : 7 + 90 * pieces]


def test_memory_that_cannot_be_written_to_can_be_stored(store: MooncakeStore) -> None:
    assert store.write(key_of(1), [bytes(10), memoryview(b"abc"), memoryview(bytearray(b"xyz")).toreadonly()])
    assert store.read(key_of(1)) == bytes(10) + b"abcxyz"


def test_empty_values_are_refused(store: MooncakeStore) -> None:
    with pytest.raises(StoreError, match="no empty values"):
        store.write(key_of(1), [b""])


def test_prefixes_keep_keys_apart(cluster: Cluster) -> None:
    one, other = MooncakeStore(cluster.new_url()), MooncakeStore(cluster.new_url())
    with one, other:
        one.write(key_of(1), [b"one"])
        assert other.contains([key_of(1)]) == [False]
        assert list(other.keys()) == []
        other.write(key_of(1), [b"other"])
        assert one.read(key_of(1)) == b"one"


def test_what_others_keep_under_the_prefix_is_not_listed(store: MooncakeStore) -> None:
    store.write(key_of(1), [b"value"])
    for name in ("notes", key_of(2).upper(), key_of(2)[:39]):
        assert store._put(store._name(name), [b"foreign"]) == 0
    assert list(store.keys()) == [key_of(1)]


# Leases.


def test_what_is_being_read_is_removed_when_the_lease_is_over(store: MooncakeStore) -> None:
    def refused() -> bool:
        """That is why it has to wait; on a busy machine the lease may be over by the time it is asked."""
        store.write(key_of(1), [value_of(1)])
        assert store.read(key_of(1)) == value_of(1)
        with store._member.client() as client:
            return int(client.remove(store._name(key_of(1)))) == LEASED

    await_true(refused)
    assert store.delete(key_of(1)) is True
    assert store.contains([key_of(1)]) == [False]


def test_what_is_read_all_the_time_stays_and_says_so(slow_cluster: Cluster) -> None:
    with MooncakeStore(slow_cluster.new_url(), lease_seconds=LEASE) as store:
        store.write(key_of(1), [value_of(1)])
        assert store.read(key_of(1)) == value_of(1)
        for change in (lambda: store.delete(key_of(1)), lambda: store.write(key_of(1), [b"new"], replace=True)):
            with pytest.raises(StoreError, match="it is being read; try again later"):
                change()
        assert store.read(key_of(1)) == value_of(1)


def test_a_lease_that_ends_under_a_read_makes_it_read_again(
    store: MooncakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(key_of(1), [value_of(1)])
    answers = [-707, -707]

    class Client:
        """The real one, whose first answers come too late."""

        def __init__(self, real: object) -> None:
            self.real = real

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def batch_get_into_multi_buffers(self, *arguments: object) -> list[int]:
            result: list[int] = self.real.batch_get_into_multi_buffers(*arguments)  # type: ignore[attr-defined]
            return [answers.pop()] if answers else result

    member = store._member
    with member.client() as real:
        monkeypatch.setattr(member, "_client", Client(real))
    assert read_parts(store, key_of(1), [400, 600]) == value_of(1)
    assert answers == []
    answers += [-707] * mooncake.ATTEMPTS
    with pytest.raises(StoreError, match="default_kv_lease_ttl"):
        read_parts(store, key_of(1), [400, 600])


# Faults.


def test_a_writer_that_dies_halfway_lists_nothing(store: MooncakeStore) -> None:
    """What it has begun is in the way of the next writer for a while, who is told so."""
    with store._member.client() as client:
        assert client.batch_put_session_start([store._name(key_of(1))], [1000]) == [0]
    assert store.contains([key_of(1)]) == [False]
    assert list(store.keys()) == []
    assert store.size(key_of(1)) is None
    assert store.read(key_of(1)) is None
    assert read_parts(store, key_of(1), [1000]) is None
    assert store.read_range(key_of(1), [memoryview(bytearray(10))], 0) is False
    assert store.delete(key_of(1)) is False
    assert store.write(key_of(1), [value_of(1)]) is False


def test_a_cluster_without_memory_says_so(own_cluster: Cluster) -> None:
    with MooncakeStore(own_cluster.new_url()) as store:
        store.check_writable()
        assert list(store.keys()) == []
        big = bytes(65 * 2**20)
        with pytest.raises(StoreError, match="has no room"):
            store.write(key_of(1), [big])
        assert store.contains([key_of(1)]) == [False]


def test_values_that_lose_their_memory_are_a_fault_until_that_is_noticed(slow_cluster: Cluster) -> None:
    with MooncakeStore(slow_cluster.new_url()) as store:
        store.write(key_of(1), [value_of(1)])
        slow_cluster.lender.kill()
        slow_cluster.lender.wait(PATIENCE)
        with pytest.raises(StoreError, match="process that lends the memory is gone"):
            read_parts(store, key_of(1), [1000])


def test_a_master_that_dies_is_a_fault_and_one_that_comes_back_is_found(own_cluster: Cluster) -> None:
    with MooncakeStore(own_cluster.new_url()) as store:
        store.write(key_of(1), [value_of(1)])
        own_cluster.master.kill()
        own_cluster.master.wait(PATIENCE)
        with pytest.raises(StoreError, match="the master does not answer"):
            store.contains([key_of(1)])
        with pytest.raises(StoreError, match="cannot be listed"):
            list(store.keys())
        own_cluster.start_master()
        deadline = time.monotonic() + PATIENCE
        written = False
        while not written:  # The client and the lender notice by themselves, within seconds.
            assert time.monotonic() < deadline
            with suppress(StoreError):
                written = store.write(key_of(1), [value_of(1)])
            time.sleep(0.1)
        assert read_parts(store, key_of(1), [1000]) == value_of(1)


def test_a_master_that_is_not_there_says_so_at_once() -> None:
    store = MooncakeStore(f"mooncake://127.0.0.1:{free_port()}")
    for call in (lambda: store.contains([key_of(1)]), lambda: store.size(key_of(1)), store.check_writable):
        with pytest.raises(StoreError, match=r"The Mooncake master at 127\.0\.0\.1:\d+ cannot be reached"):
            call()
    store.close()


def test_two_lenders_keep_two_replicas(own_cluster: Cluster) -> None:
    second = own_cluster.start_lender("64MiB")
    with MooncakeStore(f"{own_cluster.new_url()}&replicas=2") as store:
        store.write(key_of(1), [value_of(1)])
        with store._member.client() as client:
            assert len(client.get_replica_desc(store._name(key_of(1)))) == 2
        second.kill()
        second.wait(PATIENCE)
        deadline, value = time.monotonic() + PATIENCE, None
        while value is None:  # Until the master has noticed, a read may be sent to the one that is gone.
            assert time.monotonic() < deadline
            with suppress(StoreError):
                value = store.read(key_of(1))
        assert value == value_of(1)


@pytest.mark.parametrize("last_words", ["store.close(); reader.join()", "pass"], ids=["close", "exit"])
def test_leaving_under_a_read_that_hangs_ends_well(own_cluster: Cluster, last_words: str) -> None:
    """In a process of its own: what it guards against would end this one."""
    script = f"""
import threading, time
store = MooncakeStore(sys.argv[1])
store.contains([sys.argv[2]])
print("ready", flush=True)
sys.stdin.readline()
reader = threading.Thread(target=store.read, args=[sys.argv[2]], daemon=True)
reader.start()
while not store._member._calls:
    time.sleep(0.001)
print("leaving", flush=True)
{last_words}
"""
    url = own_cluster.new_url()
    with MooncakeStore(url) as store:
        store.write(key_of(1), [value_of(1, 2**20)])
    process = own_cluster.start(script, url, key_of(1))
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    own_cluster.lender.send_signal(signal.SIGSTOP)
    process.stdin.write(b"go\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"leaving\n"
    own_cluster.lender.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 0


# With a model.

PATIENT = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)


def test_a_prompt_comes_back_bit_for_bit(cluster: Cluster) -> None:
    model, url = shared_model("llama"), cluster.new_url()
    for loaded in (0, CHUNKS):
        with (
            MooncakeStore(url) as store,
            CakeCache(model, store, chunk_size=CHUNK, limits=PATIENT, strategy="load") as cake,
        ):
            assert difference(run(model, prompt(), cake), expected()) == ""
            assert cake.flush(PATIENCE)
            assert cake.report.chunks_loaded == loaded
            assert cake.report.chunks_saved == CHUNKS - loaded


def test_a_wrong_value_is_replaced_and_a_lost_cluster_costs_only_time(own_cluster: Cluster) -> None:
    model = shared_model("llama")
    with MooncakeStore(own_cluster.new_url()) as store:

        def generate(save: bool = True) -> CakeCache:
            with CakeCache(model, store, chunk_size=CHUNK, limits=PATIENT, strategy="load", save=save) as cake:
                assert difference(run(model, prompt(), cake), expected()) == ""
                assert cake.flush(PATIENCE)
                return cake

        generate()
        key = sorted(store.keys())[0]
        value = store.read(key) or bytearray()
        value[-1] ^= 1
        store.write(key, [value], replace=True)
        report = generate().report
        assert (report.chunks_loaded, report.chunks_failed, report.chunks_saved) == (CHUNKS - 1, 1, 1)
        assert generate().report.chunks_loaded == CHUNKS
        own_cluster.lender.kill()
        own_cluster.lender.wait(PATIENCE)
        assert generate(save=False).report.chunks_computed == CHUNKS


def test_mooncake_as_a_tier(cluster: Cluster, tmp_path: Path) -> None:
    model, url = shared_model("llama"), cluster.new_url()
    for near, reads in ((MemoryStore(), 0), (LocalStore(tmp_path), CHUNKS)):
        with MooncakeStore(url) as far, TierStore([near, far]) as tiers:
            with CakeCache(model, tiers, chunk_size=CHUNK, limits=PATIENT, strategy="load") as cake:
                assert difference(run(model, prompt(), cake), expected()) == ""
                assert cake.flush(PATIENCE)
            assert tiers.flush(PATIENCE)
            assert [tier.reads for tier in tiers.counts()] == [0, reads]
            assert tiers.counts()[0].promoted == reads
            assert len(list(near.keys())) == CHUNKS
