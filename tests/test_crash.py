"""Nothing is lost and nothing is half there, whenever a writer is killed: at every step and at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from cake_hf import CorruptChunk
from cake_hf.chunks.codec import ChunkMetadata, check_file, checksums, encode_header
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.stores import LocalStore
from children import many_children, start_child, start_together

KILLS = 50
PATIENCE = 60.0

HOLDER = """
from cake_hf.stores.local import LocalStore
def hold(descriptor):
    print("holding", flush=True)
    sys.stdin.read()
    os._exit(0)
store = LocalStore(sys.argv[1])
os.fsync = hold
store.write(sys.argv[2], [b"half of a value"])
"""

CROWD = """
from cake_hf.stores.local import LocalStore
import random
store, draw = LocalStore(sys.argv[1]), random.Random(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    number = draw.randrange(20)
    key, value = f"{number:040x}", bytes([number]) * 5000
    if draw.random() < 0.6:
        store.write(key, [value[:99], value[99:]], replace=draw.random() < 0.5)
    elif draw.random() < 0.3:
        store.delete(key)
    elif draw.random() < 0.3:
        store = LocalStore(sys.argv[1])
    else:
        assert store.read(key) in (None, value)
"""


def leftovers(root: Path) -> list[str]:
    return sorted(os.listdir(root / "partial")) if (root / "partial").exists() else []


def test_leftovers_of_a_killed_writer_are_swept_and_files_of_a_living_one_stay(tmp_path: Path) -> None:
    with start_child(HOLDER, tmp_path, f"{1:040x}") as killed, start_child(HOLDER, tmp_path, f"{2:040x}") as living:
        for process in (killed, living):
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
        assert len(leftovers(tmp_path)) == 2
        assert LocalStore(tmp_path).sweep() == 0
        killed.kill()
        killed.wait(PATIENCE)
        store = LocalStore(tmp_path)
        store.check_writable()
        assert [name.split(".")[0] for name in leftovers(tmp_path)] == [f"{2:040x}"]
        assert list(store.keys()) == []
        living.communicate("")
    assert store.sweep() == 1


def test_many_processes_share_a_directory(tmp_path: Path) -> None:
    processes = start_together(CROWD, *((tmp_path, seed) for seed in range(4)))
    for process in processes:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in processes] == [0] * 4
    store = LocalStore(tmp_path)
    keys = list(store.keys())
    assert keys
    assert all(store.read(key) == bytes([int(key, 16)]) * 5000 for key in keys)
    assert leftovers(tmp_path) == []


# Chunks, made here and written there: the children know nothing of tensors.


def make_chunks(folder: Path, count: int, tokens: int) -> list[str]:
    """Whole chunk files in a folder, for the children to put into the store; returns their keys."""
    layout = ChunkLayout(tokens, tuple(Piece(f"layers.{n}.keys", 2, 16, torch.float32) for n in range(4)))
    keys = [random.Random(number).randbytes(20).hex() for number in range(count)]
    folder.mkdir()
    for number, key in enumerate(keys):
        payload = random.Random(number).randbytes(layout.nbytes)
        facts = ChunkMetadata(key, "0" * 40, number, "0" * 40, "a model", checksums(payload, layout))
        (folder / key).write_bytes(encode_header(layout, facts) + payload)
    return keys


def check_whole(store: LocalStore) -> set[str]:
    """Every chunk that is listed verifies; returns their keys."""
    listed = set(store.keys())
    for key in listed:
        value = store.read(key)
        assert value is not None
        check_file(value, key)
    return listed


# Dies before the n-th call that touches the disk; a write that it dies in has left half of its bytes there.
STEPPER = """
from cake_hf.stores.local import LocalStore
import signal
def dying(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            if function is real_writev:
                os.write(args[0], bytes(args[1][0])[: args[1][0].nbytes // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
class Careless(LocalStore):
    def _publish(self, key, parts, replace):
        final = self._folder.path(key)
        os.makedirs(os.path.dirname(final), exist_ok=True)
        descriptor = os.open(final, os.O_WRONLY | os.O_CREAT)
        os.writev(descriptor, parts)
        os.close(descriptor)
folder, key, left = sys.argv[2], sys.argv[3], int(sys.argv[4])
with open(f"{folder}/{key}", "rb") as file:
    value = file.read()
store = (Careless if sys.argv[5] == "careless" else LocalStore)(sys.argv[1])
real_writev = os.writev
for name in ("open", "mkdir", "ftruncate", "writev", "fsync", "link", "unlink", "close"):
    setattr(os, name, dying(getattr(os, name)))
store.write(key, [memoryview(value)[:4096], memoryview(value)[4096:]])
"""


def test_a_writer_that_dies_at_any_step_leaves_a_whole_chunk_or_none(tmp_path: Path) -> None:
    (key,) = make_chunks(tmp_path / "chunks", 1, tokens=64)
    listed_after: list[bool] = []
    leftovers_after: list[bool] = []
    with many_children(STEPPER) as die:
        for step in range(1, 100):
            root = tmp_path / f"store-{step}"
            code = die(root, tmp_path / "chunks", key, step, "careful")
            assert code in (0, -signal.SIGKILL)
            leftovers_after.append(bool(leftovers(root)))
            store = LocalStore(root)
            store.check_writable()
            assert leftovers(root) == []
            listed_after.append(bool(check_whole(store)))
            if code == 0:
                break
            assert store.write(key, [(tmp_path / "chunks" / key).read_bytes()]) is not listed_after[-1]
    assert code == 0
    published = listed_after.index(True)
    assert listed_after == [step >= published for step in range(len(listed_after))]
    assert published > 5, "the steps before the chunk appears were not all died at"
    assert any(leftovers_after), "no death left anything to be swept"


def test_the_check_would_notice_a_store_that_writes_in_place(tmp_path: Path) -> None:
    """The negative control: a store that gives a file its name before its bytes are there."""
    (key,) = make_chunks(tmp_path / "chunks", 1, tokens=64)
    with many_children(STEPPER) as die, pytest.raises(CorruptChunk):  # noqa: PT012
        for step in range(1, 10):
            die(tmp_path / "store", tmp_path / "chunks", key, step, "careless")
            check_whole(LocalStore(tmp_path / "store"))


WRITER = """
from cake_hf.stores.local import LocalStore
import random
draw, folder = random.Random(int(sys.argv[3])), sys.argv[2]
values = {}
for key in os.listdir(folder):
    with open(f"{folder}/{key}", "rb") as file:
        values[key] = memoryview(file.read())
store = LocalStore(sys.argv[1])
kept = min(values)
store.write(kept, [values[kept]])
print("writing", flush=True)
while True:
    key = draw.choice(sorted(values))
    cut = draw.randrange(len(values[key]))
    if key == kept or draw.random() < 0.8:
        store.write(key, [values[key][:cut], values[key][cut:]], replace=draw.random() < 0.7)
    else:
        store.delete(key)
"""


def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    """One directory for all: what one death leaves must not harm those after it, nor a reader that stays open."""
    keys = make_chunks(tmp_path / "chunks", 6, tokens=512)
    root = tmp_path / "store"
    reader = LocalStore(root)
    for seed in range(KILLS):
        with start_child(WRITER, root, tmp_path / "chunks", seed) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(random.Random(seed).uniform(0.0, 0.03))
            process.kill()
        listed = check_whole(reader)
        assert {min(keys)} <= listed <= set(keys), "a write that had returned is lost"
        LocalStore(root).check_writable()
        assert leftovers(root) == []
        assert check_whole(reader) == listed
