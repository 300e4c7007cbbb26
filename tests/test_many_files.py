"""Looking through a directory of many chunks: who waits for it, what it takes, and how it ends early."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, CorruptChunk
from cake_hf.chunks import codec
from cake_hf.chunks.codec import ChunkMetadata, checksums, encode_header, parse_header
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.tensor_table import LONGEST_KNOWN, MOST_KNOWN, known_table
from cake_hf.cli import many
from cake_hf.cli.gc import collect, select
from cake_hf.cli.inspect_store import existing_store, take_inventory
from cake_hf.cli.many import MOST_AT_ONCE, each_answer
from cake_hf.cli.verify import verify
from cake_hf.stores import LocalStore
from cake_hf.testing.contract import key_of
from children import command_of
from commands import flat, no_progress, run_command
from models import CHUNK, prompt, shared_model
from test_eviction import LAYOUT
from waiting import PATIENCE

CHUNKS = 40
Progress = Callable[[int, int], None]
Scan = Callable[[LocalStore, Progress], object]

SCANS: dict[str, Scan] = {
    "ls": take_inventory,
    "verify": verify,
    "gc": lambda store, progress: select(store, 1, None, "front-first", time.time(), progress),
}


def made(number: int, layout: ChunkLayout = LAYOUT, model: str = "a model") -> bytes:
    """A whole chunk of a prompt that has no other."""
    payload = number.to_bytes(8, "little") * (layout.nbytes // 8 + 1)
    payload = payload[: layout.nbytes]
    facts = ChunkMetadata(key_of(number), "0" * 40, 0, "0" * 40, model, checksums(payload, layout))
    return encode_header(layout, facts) + payload


def fill(root: Path, chunks: int = CHUNKS, layout: ChunkLayout = LAYOUT) -> LocalStore:
    """A store, made without bringing each file to the disk."""
    store = LocalStore(root)
    store.check_writable()
    for number in range(chunks):
        (root / key_of(number)[:2]).mkdir(exist_ok=True)
        (root / key_of(number)[:2] / f"{key_of(number)}.safetensors").write_bytes(made(number, layout))
    return store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store that has an account, as each has where a budget is kept."""
    store = fill(tmp_path / "store")
    LocalStore(store.root, budget=2**30).write(key_of(CHUNKS), [made(CHUNKS)])
    assert (store.root / "bytes").exists()
    return store.root


def damage(root: Path, key: str) -> None:
    path = root / key[:2] / f"{key}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


ASKING = threading.Lock()
"""Who asks whether the lock is free takes it for a moment."""


def assert_free(root: Path) -> None:
    """Asserts that the lock that writers take is free."""
    assert not (root / "bytes.lock").exists()
    with ASKING, (root / "bytes").open() as account:
        fcntl.flock(account, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Who waits.


@pytest.mark.fault(
    "Processes",
    "`ls`, `info`, `verify` or `gc` looks through 100,000 chunks while others use the store.",
    "They do not wait for it: it holds no lock while it looks, and one for each single chunk that `gc` deletes.",
)
@pytest.mark.parametrize("name", SCANS)
def test_whenever_a_file_is_looked_at_the_lock_is_free(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = count()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **options: Any) -> Any:
            next(looks)
            assert_free(root)
            return call(*arguments, **options)

        return look

    for call in ("scandir", "pread", "preadv"):
        monkeypatch.setattr(os, call, watched(getattr(os, call)))
    SCANS[name](existing_store(str(root)), lambda done, total: assert_free(root))
    assert next(looks) > CHUNKS


def test_gc_gives_the_lock_back_after_each_chunk(root: Path) -> None:
    store = existing_store(str(root))
    assert isinstance(store, LocalStore)
    free: list[int] = []

    def watch(done: int, total: int) -> None:
        assert_free(root)
        free.append(done)

    gone = collect(store, select(store, 1, None, "lru", time.time(), no_progress), watch).gone
    assert len(gone) == len(free) == CHUNKS + 1


OTHER = """
from cake_hf.stores.local import LocalStore
store = LocalStore(sys.argv[1], budget=int(sys.argv[2]))
assert store.write("ff" * 20, [b"new" * 100])
assert store.read("ff" * 20) == b"new" * 100
assert store.delete("ff" * 20)
"""


@pytest.mark.parametrize("name", SCANS)
def test_another_process_writes_evicts_and_reads_meanwhile(root: Path, name: str) -> None:
    """What goes while it is looked at is left out."""
    keys = set(LocalStore(root).keys())

    def others_come(done: int, total: int) -> None:
        if done == 1:
            command = command_of(OTHER, root, CHUNKS * len(made(0)) - 1)
            subprocess.run(command, check=True, timeout=PATIENCE)

    SCANS[name](existing_store(str(root)), others_come)
    assert set(LocalStore(root).keys()) < keys


@pytest.mark.parametrize("name", SCANS)
def test_a_prompt_is_saved_and_restored_meanwhile(root: Path, name: str) -> None:
    model, ids = shared_model("llama"), prompt()

    def others_come(done: int, total: int) -> None:
        if done > 1:
            return
        with CakeCache(model, LocalStore(root, budget=2**30), chunk_size=CHUNK) as cache:
            cache.prefill(ids)
            assert cache.flush(PATIENCE)
            assert cache.report.chunks_saved == len(ids[0]) // CHUNK
        with CakeCache(model, LocalStore(root, budget=2**30), chunk_size=CHUNK, strategy="load") as cache:
            assert cache.prefill(ids).chunks_loaded == len(ids[0]) // CHUNK

    with torch.no_grad():
        SCANS[name](existing_store(str(root)), others_come)


# What it takes.


WIDE = ChunkLayout(1, tuple(Piece(f"layers.{n // 2}.{n % 2}", 1, 2, torch.bfloat16, n // 2) for n in range(64)))
"""As many tensors as a model of 32 layers has."""


@pytest.mark.fault(
    "Time and bounds",
    "`ls` or `info` looks at a store with 100,000 chunks of a model of many layers.",
    "It keeps under a kilobyte of each: what all chunks of a model have in common is read and kept once.",
)
def test_an_inventory_keeps_little_per_chunk(tmp_path: Path) -> None:
    store = fill(tmp_path, 300, WIDE)
    take_inventory(store, no_progress)
    tracemalloc.start()
    try:
        inventory = take_inventory(store, no_progress)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(inventory.chunks) == 300
    assert len({id(chunk.table) for chunk in inventory.chunks.values()}) == 1
    assert kept < 300 * 2**10


def test_tables_that_are_not_needed_are_not_kept() -> None:
    """A store filled with odd tables takes no more than this."""
    for tokens in range(1, 3 * MOST_KNOWN):
        parse_header(made(1, ChunkLayout(tokens, LAYOUT.pieces)))
    assert known_table.cache_info().currsize <= MOST_KNOWN
    before = known_table.cache_info()
    pieces = tuple(Piece(f"layers.{n}.keys", 1, 1, torch.bfloat16, n) for n in range(LONGEST_KNOWN // 60))
    facts, table = parse_header(made(1, ChunkLayout(1, pieces)))
    assert (facts.key, len(table)) == (key_of(1), len(pieces))
    assert known_table.cache_info() == before


def assert_judged_alike(raw: bytes) -> None:
    """Read as it is, and read where its table may be known, a header says the same or is refused."""
    outcomes: list[object] = []
    with suppress(*codec._UNREADABLE, CorruptChunk):
        outcomes.append(codec._parsed(raw[8:]))
    with suppress(CorruptChunk):
        outcomes.append(parse_header(raw))
    assert outcomes in ([], outcomes[:1] * 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_known_table_changes_no_verdict(seed: int) -> None:
    """Ten letters of a header are changed, one at a time; each time both ways of reading it must say the same."""
    header, draw = bytearray(encode_header(WIDE, parse_header(made(1, WIDE))[0])), random.Random(seed)
    parse_header(header)
    for _ in range(10):
        changed = bytearray(header)
        changed[draw.randrange(8, len(header))] = draw.choice(b' ,:"{}[]0129ax\\\xc3\xa9\t')
        assert_judged_alike(bytes(changed))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b',"layers', b',"__metadata__":{},"layers', 1),
        lambda text: text.replace(b',"layers', b',"__metadata__":{"format":"cake_hf"},"layers', 1),
        lambda text: text.replace(b',"layers', b',"layers.0.0":null,"layers', 1),
        lambda text: text.replace(b'"shape":[1', b'"shape":[0,"x"],"shape":[1', 1),
        lambda text: text.rstrip() + b"}",
        lambda text: text.rstrip() + b"\x00",
        lambda text: text.rstrip() + b" \n\t",
        lambda text: text.rstrip() + b",",
        lambda text: text.rstrip()[:-1],
        lambda text: text[: text.index(b"},") + 1] + b"}",
        lambda text: text[: text.index(b"},") + 1],
    ],
    ids=[
        "metadata twice",
        "other metadata",
        "a tensor twice",
        "a shape twice",
        "a brace more",
        "a zero",
        "other blanks",
        "a comma more",
        "a brace less",
        "no tensors",
        "no end",
    ],
)
def test_odd_tables_are_judged_as_json(change: Callable[[bytes], bytes]) -> None:
    header = encode_header(WIDE, parse_header(made(1, WIDE))[0])
    text = change(header[8:])
    raw = len(text).to_bytes(8, "little") + text
    assert_judged_alike(raw)


# How it ends early.


def join_threads() -> None:
    """Those that have been left end with their last question."""
    for thread in threading.enumerate():
        if thread.name.startswith("cake-look"):
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Processes that run a part of the tests ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(number: int) -> Progress:
    """As Ctrl-C does it in the main thread."""

    def progress(done: int, total: int) -> None:
        if done == number:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.fault(
    "Time and bounds",
    "Ctrl-C while `cake-hf verify` reads a large store.",
    "It ends at once, also where a read hangs, shows what it has found, deletes nothing, and its exit code is 130.",
)
def test_verify_says_what_it_found_when_it_is_stopped(root: Path) -> None:
    keys = list(LocalStore(root).keys())
    damage(root, keys[2])
    result = verify(existing_store(str(root)), interrupt_at(7))
    assert (result.stopped, result.checked, result.left) == (True, 7, len(keys) - 7)
    assert [chunk.key for chunk in result.bad] == [keys[2]]


@pytest.mark.parametrize("number", [1, CHUNKS + 1])
def test_a_stopped_verify_deletes_nothing(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at its last chunk."""
    keys = list(LocalStore(root).keys())
    damage(root, keys[0])
    monkeypatch.setattr(
        "cake_hf.cli.verify_command.verify",
        lambda store, progress, **options: verify(store, interrupt_at(number), **options),
    )
    result = run_command("verify", root, "--fix")
    assert result.exit_code == 130
    assert keys[0] in result.output
    left = len(keys) - number
    assert f"Stopped: 1 damaged of {number} chunk" in flat(result.output)
    assert f"{left} chunk" in flat(result.output)
    assert "nothing deleted" in flat(result.output)
    assert set(LocalStore(root).keys()) == set(keys)


@pytest.mark.parametrize("name", SCANS)
def test_an_interrupted_inventory_does_not_wait_for_a_hanging_read(root: Path, name: str) -> None:
    hangs, released = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        released.wait(PATIENCE)

    hanging = type("Hanging", (LocalStore,), dict.fromkeys(("read", "read_range", "place"), hang))(root)

    def stop() -> None:
        hangs.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)

    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        if name == "verify":
            assert verify(hanging, no_progress).stopped
        else:
            with pytest.raises(KeyboardInterrupt):
                SCANS[name](hanging, no_progress)
        assert not released.is_set()
    finally:
        released.set()
        stopping.join()
        join_threads()


# Asking in threads.


def test_answers_come_in_the_order_of_the_questions() -> None:
    gates = [threading.Event() for _ in range(4)]

    def ask(number: int) -> int:
        if number < 3:
            gates[number + 1].wait(PATIENCE)  # each waits for the one behind it
        gates[number].set()
        return number * number

    assert list(each_answer(range(4), ask, threads=4)) == [(0, 0), (1, 1), (2, 4), (3, 9)]


@pytest.mark.parametrize("items", [0, 1, 7, MOST_AT_ONCE * 50 + 1])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_each_item_is_asked_once_and_answered_in_order(items: int, threads: int) -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        return -number

    assert list(each_answer(range(items), ask, threads)) == [(number, -number) for number in range(items)]
    assert sorted(asked) == list(range(items))


@pytest.mark.parametrize("kind", [ValueError, MemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [0, 100, 499])
def test_an_error_is_raised_in_its_items_turn(kind: type[BaseException], at: int) -> None:
    def ask(number: int) -> int:
        if number == at:
            raise kind("in a thread")
        return number

    seen: list[int] = []
    with pytest.raises(kind, match="in a thread"):
        seen.extend(number for number, _ in each_answer(range(500), ask))
    assert seen == list(range(at))


def test_not_much_is_asked_ahead_and_nothing_once_it_is_closed() -> None:
    asked = count()
    with closing(each_answer(range(10**6), lambda number: next(asked), threads=2)) as answers:
        next(answers)
    join_threads()
    assert next(asked) <= MOST_AT_ONCE * (many.AHEAD * 2 + 1)


@pytest.mark.parametrize("given", [0, 1])
def test_where_there_are_no_more_threads_fewer_do(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    start, left = threading.Thread.start, [given]

    def refuse(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(each_answer(range(100), str)) == [(number, str(number)) for number in range(100)]
