"""A store in a directory touches nothing that is not its own, follows no link, and changes nothing when only looked at."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cake_hf import CakeCache, CorruptChunk, LocalStore, StoreError, export_pack, open_store
from cake_hf.chunks.codec import MAX_HEADER_BYTES
from cake_hf.cli.verify import verify
from cake_hf.stores.manifest import MANIFEST
from cake_hf.stores.pack import FIRST_READ, open_folder_pack
from cake_hf.testing.contract import key_of, value_of
from cake_hf.transfer.cost_notes import flush_notes
from commands import flat, run_command
from models import CHUNK, prompt, shared_model
from stored import filled_store
from test_crash import make_chunks
from waiting import PATIENCE

LEFTOVER = f"{key_of(7)}.0123456789abcdef"
NO_STORE = "is no store of cake_hf"


def path_of(root: Path, number: int) -> Path:
    return root / key_of(number)[:2] / f"{key_of(number)}.safetensors"


def snapshot(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All that there is: kinds, dates (of directories, too) and contents; links are not followed."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))] if root.exists() else []:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ctime_ns, content)
    return found


def fill(root: Path, count: int = 3) -> LocalStore:
    store = LocalStore(root, budget=10**6)
    for number in range(count):
        store.write(key_of(number), [value_of(number)])
        os.utime(path_of(root, number), (10**9, 10**9))
    return store


# Somebody's own directory.


def photos(root: Path) -> None:
    (root / "partial").mkdir()
    (root / "partial" / "draft.txt").write_text("mine")
    (root / "partial" / LEFTOVER).write_text("mine, too")
    (root / "photo.jpg").write_text("mine")


def only_a_partial_folder(root: Path) -> None:
    (root / "partial").mkdir()
    (root / "partial" / "movie.part").write_text("mine")


def only_notes(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "notes" / "diary.md").write_text("mine")


def only_bytes(root: Path) -> None:
    (root / "bytes").write_text("mine")


def two_digits(root: Path) -> None:
    (root / "ab").mkdir()
    (root / "ab" / "abc.txt").write_text("mine")


def a_link_only(root: Path) -> None:
    (root / "partial").symlink_to(root.parent)


def a_marker_that_is_a_link(root: Path) -> None:
    (root / "cake-hf-store").symlink_to("/etc/hostname")
    (root / "other").write_text("mine")


def hidden(root: Path) -> None:
    (root / ".bashrc").write_text("mine")


OWN = [photos, only_a_partial_folder, only_notes, only_bytes, two_digits, a_link_only, a_marker_that_is_a_link, hidden]


@pytest.mark.fault(
    "Files",
    "The store's path is a directory of your own, with a folder that is called `partial`, `notes` or `3f`.",
    "Nothing in it is touched; writing is refused in one sentence.",
)
@pytest.mark.parametrize("make", OWN)
def test_a_directory_of_somebodys_own_is_refused_and_untouched(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    before = snapshot(tmp_path)
    for budget in (None, 10**6):
        store = LocalStore(tmp_path, budget=budget)
        for write in (store.check_writable, lambda store=store: store.write(key_of(1), [b"value"])):
            with pytest.raises(StoreError, match="holds other files and is no store"):
                write()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("verify", "--fix"), ("gc", "--budget", "1KB"), ("info",)])
def test_commands_say_that_it_is_no_store_and_touch_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    photos(tmp_path)
    before = snapshot(tmp_path)
    result = run_command(command[0], tmp_path, *command[1:])
    assert result.exit_code == 2
    assert NO_STORE in flat(result.stderr)
    assert "\n" not in result.stderr.strip()
    assert snapshot(tmp_path) == before


def test_a_cache_on_somebodys_own_directory_is_refused_and_one_that_reads_is_not(tmp_path: Path) -> None:
    photos(tmp_path)
    model, before = shared_model("llama"), snapshot(tmp_path)
    with pytest.raises(StoreError, match="holds other files"):
        CakeCache(model, tmp_path, chunk_size=CHUNK)
    with CakeCache(model, tmp_path, chunk_size=CHUNK, save=False) as cache:
        cache.prefill(prompt())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["lost+found", ".snapshot", ".DS_Store"])
def test_what_filesystems_put_into_an_empty_directory_is_not_a_users(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert LocalStore(tmp_path).write(key_of(1), [b"value"])


# Stores of earlier versions have no marker.


def old_store(root: Path) -> None:
    fill(root)
    (root / "cake-hf-store").unlink()
    (root / "partial" / LEFTOVER).write_bytes(b"half")


def old_store_with_a_readme(root: Path) -> None:
    old_store(root)
    (root / "README.md").write_text("ours")


def old_store_without_chunks(root: Path) -> None:
    old_store(root)
    for number in range(3):
        path_of(root, number).unlink()
    (root / "notes").mkdir()
    (root / "notes" / f"costs-{'0' * 16}.json").write_text("{}")


def old_store_of_a_killed_first_writer(root: Path) -> None:
    (root / "partial").mkdir()
    (root / "partial" / LEFTOVER).write_bytes(b"half")


def old_store_that_was_only_opened(root: Path) -> None:
    root.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    "make",
    [
        old_store,
        old_store_with_a_readme,
        old_store_without_chunks,
        old_store_of_a_killed_first_writer,
        old_store_that_was_only_opened,
    ],
)
def test_a_store_without_a_marker_goes_on(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    assert run_command("verify", tmp_path).exit_code in (0, 1)  # these values are no chunks
    store = LocalStore(tmp_path)
    assert store.write(key_of(9), [value_of(9)])
    assert os.listdir(tmp_path / "partial") == []
    assert b"store of cake_hf" in (tmp_path / "cake-hf-store").read_bytes()
    assert store.read(key_of(9)) == value_of(9)


# Links and other things under names of ours.


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory elsewhere, with what a store might take for its own."""
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / LEFTOVER).write_text("mine")
    (outside / f"{key_of(1)}.safetensors").write_bytes(value_of(1))
    (outside / f"costs-{'0' * 16}.json").write_text("mine")
    (outside / "bytes").write_text("0" * 20 + "\n")
    for path in outside.iterdir():
        os.utime(path, (10**9, 10**9))
    return outside


def link(root: Path, name: str, target: Path) -> None:
    path = root / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def use_all(store: LocalStore) -> None:
    """Whatever a store can do; what is in its way may be an error, if it is one of ours."""
    calls: list[Callable[[], object]] = [
        store.check_writable,
        lambda: store.write(key_of(1), [b"other"], replace=True),
        lambda: store.write(key_of(5), [bytes(500_000)]),
        lambda: store.write(key_of(6), [bytes(600_000)]),
        lambda: store.read(key_of(1)),
        lambda: store.delete(key_of(1)),
        lambda: [store.evict(entry) for entry in store.entries()],
        lambda: list(store.keys()),
        store.sweep,
    ]
    for call in calls:
        with suppress(StoreError):
            call()


@pytest.mark.fault(
    "Files",
    "Below the store's directory is a link to somewhere else, as after a clone or from an archive.",
    "It is not followed: what it leads to is neither read, written, dated nor deleted.",
)
@pytest.mark.parametrize("name", ["partial", "notes", "bytes", key_of(1)[:2], "bytes.lock", "cake-hf-store"])
def test_a_link_below_the_root_is_not_followed(tmp_path: Path, outside: Path, name: str) -> None:
    root = tmp_path / "store"
    store = fill(root)
    link(root, name, outside / "bytes" if name in ("bytes", "bytes.lock", "cake-hf-store") else outside)
    before = snapshot(outside)
    use_all(store)
    use_all(LocalStore(root, budget=10**6))
    with CakeCache(shared_model("llama"), LocalStore(root), chunk_size=CHUNK, save=False) as cache:
        cache.prefill(prompt())
    for command in (("ls",), ("verify", "--fix"), ("gc", "--older-than", "1d")):
        run_command(command[0], root, *command[1:])
    assert flush_notes(PATIENCE)
    assert snapshot(outside) == before


def test_a_linked_file_is_no_chunk_and_no_leftover(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "store"
    store = fill(root)
    link(root, f"{key_of(1)[:2]}/{key_of(1)}.safetensors", outside / f"{key_of(1)}.safetensors")
    link(root, f"partial/{LEFTOVER}", outside / LEFTOVER)
    before = snapshot(outside)
    assert store.contains([key_of(1)]) == [False]
    assert store.read(key_of(1)) is None
    assert key_of(1) not in set(store.keys())
    assert store.delete(key_of(1)) is False
    for replace in (False, True):
        with pytest.raises(StoreError, match="no plain file"):
            store.write(key_of(1), [b"value"], replace=replace)
    assert store.sweep() == 0
    assert os.path.islink(root / "partial" / LEFTOVER)
    assert snapshot(outside) == before


def test_notes_are_not_written_through_a_link(tmp_path: Path, outside: Path) -> None:
    root = tmp_path / "store"
    fill(root)
    link(root, "notes", outside)
    before = snapshot(outside)
    with CakeCache(shared_model("llama"), root, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        cache.flush()
    assert flush_notes(PATIENCE)
    assert snapshot(outside) == before


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = LocalStore(tmp_path / "store", budget=10**6)
    assert store.write(key_of(1), [b"value"])
    assert LocalStore(tmp_path / "disk").read(key_of(1)) == b"value"


def test_an_account_with_a_second_name_elsewhere_is_not_written_to(tmp_path: Path) -> None:
    root, other = tmp_path / "store", tmp_path / "other"
    fill(root)
    other.write_text("0" * 20 + "\n")
    (root / "bytes").unlink()
    os.link(other, root / "bytes")
    LocalStore(root, budget=10**6).write(key_of(5), [value_of(5)])
    assert other.read_text() == "0" * 20 + "\n"
    assert int((root / "bytes").read_text()) == 4000


@pytest.mark.parametrize("folder", ["partial", key_of(1)[:2]])
def test_a_folder_that_becomes_a_link_between_check_and_use(
    tmp_path: Path, outside: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race that only descriptors win: whatever is swapped, what was opened is what is used."""
    root = tmp_path / "store"
    store = fill(root)
    before, unlink, rename, os_link = snapshot(outside), os.unlink, os.rename, os.link

    def swapping(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            if not (root / folder).is_symlink() and options:
                rename(root / folder, tmp_path / "moved")
                (root / folder).symlink_to(outside)
            real(*arguments, **options)

        return call

    for name, real in (("unlink", unlink), ("rename", rename), ("link", os_link)):
        monkeypatch.setattr(os, name, swapping(real))
    use_all(store)
    monkeypatch.undo()
    assert (root / folder).is_symlink()
    assert snapshot(outside) == before


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("devices are made by root only")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.fault(
    "Files",
    "A pipe, a device or a socket has the name of a chunk.",
    "It counts as a miss and is neither read nor removed; nothing hangs.",
)
@pytest.mark.parametrize("make", [a_pipe, a_socket, a_device, a_folder])
@pytest.mark.parametrize("where", ["chunk", "leftover", "bytes", "note", "marker"])
def test_a_pipe_or_device_under_a_name_of_ours_does_not_hang(
    tmp_path: Path, make: Callable[[Path], None], where: str
) -> None:
    root = tmp_path / "store"
    fill(root)
    path = {
        "chunk": path_of(root, 1),
        "leftover": root / "partial" / LEFTOVER,
        "bytes": root / "bytes",
        "note": root / "notes" / f"costs-{'0' * 16}.json",
        "marker": root / "cake-hf-store",
    }[where]
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    kind = stat.S_IFMT(path.lstat().st_mode)

    def use() -> None:
        use_all(LocalStore(root, budget=10**6))
        for command in (("ls",), ("verify", "--fix"), ("gc", "--older-than", "1d")):
            run_command(command[0], root, *command[1:])

    user = threading.Thread(target=use, daemon=True)
    user.start()
    user.join(PATIENCE)
    assert not user.is_alive()
    assert stat.S_IFMT(path.lstat().st_mode) == kind
    if where == "chunk":
        assert LocalStore(root).contains([key_of(1)]) == [False]


def test_only_leftovers_of_our_names_are_swept(tmp_path: Path) -> None:
    store = fill(tmp_path)
    names = ["notes.txt", "leftover.0", f"{key_of(7)}.xyz", f"{key_of(7)}", f"{LEFTOVER}.bak", f"x{LEFTOVER}"]
    for name in [*names, LEFTOVER, "probe.0123456789abcdef"]:
        (tmp_path / "partial" / name).write_text("half")
    assert store.sweep() == 2
    assert sorted(os.listdir(tmp_path / "partial")) == sorted(names)


# Looking.


def look_with_ls(root: Path) -> None:
    run_command("ls", root)


def look_with_info(root: Path) -> None:
    run_command("info", root)


def look_with_verify(root: Path) -> None:
    run_command("verify", root)


def look_with_a_dry_run(root: Path) -> None:
    run_command("gc", root, "--budget", "1KB", "--dry-run")


def look_with_a_cache(root: Path) -> None:
    with CakeCache(shared_model("llama"), root, chunk_size=CHUNK, save=False) as cache:
        cache.prefill(prompt())
    assert flush_notes(PATIENCE)


def look_with_a_store_object_and_a_cache(root: Path) -> None:
    with CakeCache(shared_model("llama"), LocalStore(root, budget=10**6), chunk_size=CHUNK, save=False) as cache:
        cache.prefill(prompt())
    assert flush_notes(PATIENCE)


def look_with_tiers(root: Path) -> None:
    with CakeCache(shared_model("llama"), ["memory:", str(root)], chunk_size=CHUNK, save=False) as cache:
        cache.prefill(prompt())
    assert flush_notes(PATIENCE)


def look_with_a_store(root: Path) -> None:
    store = open_store(f"file://{root}?budget=1MB")
    store.look_only()
    store.contains([key_of(1)])
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        store.read(key)
    store.close()


LOOKS = [
    look_with_ls,
    look_with_info,
    look_with_verify,
    look_with_a_dry_run,
    look_with_a_cache,
    look_with_a_store_object_and_a_cache,
    look_with_tiers,
    look_with_a_store,
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chunks of a prompt, last used long ago, and a killed writer's leftover."""
    root = tmp_path_factory.mktemp("filled")
    with CakeCache(shared_model("llama"), root, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        cache.flush()
    for path in root.glob("*/*.safetensors"):
        os.utime(path, (10**9, 10**9))
    (root / "partial" / LEFTOVER).write_bytes(b"half")
    return root


@pytest.mark.fault(
    "Files",
    "A store is only looked at: `ls`, `info`, `verify`, a dry run of `gc`, `save=False`.",
    "Nothing is made, removed or dated in it, whether it is full, empty, read-only or not there at all.",
)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("state", ["full", "empty", "missing"])
def test_looking_changes_nothing(tmp_path: Path, filled: Path, look: Callable[[Path], None], state: str) -> None:
    root = tmp_path / "store"
    if state == "full":
        shutil.copytree(filled, root)
    elif state == "empty":
        root.mkdir()
    before = snapshot(tmp_path)
    look(root)
    assert snapshot(tmp_path) == before


def test_reads_count_as_a_use_again_once_the_store_is_written_to(tmp_path: Path) -> None:
    store = fill(tmp_path)
    again = LocalStore(tmp_path)
    again.look_only()
    again.read(key_of(1))
    assert path_of(tmp_path, 1).stat().st_mtime == 10**9
    again.write(key_of(5), [b"value"])
    again.read(key_of(1))
    assert path_of(tmp_path, 1).stat().st_mtime > 10**9
    store.look_only()
    store.read(key_of(2))
    assert path_of(tmp_path, 2).stat().st_mtime > 10**9, "another cache writes to it, so it is in use"


# Directories that cannot be looked into.


@pytest.fixture
def forbidding(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives a function after which nothing of that name may be opened or listed (root may always, so it is injected)."""
    os_open = os.open

    def forbid(name: str) -> None:
        def refuse(path: Any, *arguments: Any, **options: Any) -> int:
            if os.fspath(path).rpartition("/")[2] == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return os_open(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)

    return forbid


@pytest.mark.fault(
    "Files",
    "The store's directory may not be read.",
    "An error that says so; it is not taken for an empty store.",
)
@pytest.mark.parametrize("name", ["store", key_of(1)[:2]])
def test_a_directory_that_may_not_be_read_is_not_an_empty_one(
    tmp_path: Path, forbidding: Callable[[str], None], name: str
) -> None:
    root = tmp_path / "store"
    store = fill(root)
    forbidding(name)
    for call in (
        lambda: store.contains([key_of(1)]),
        lambda: store.read(key_of(1)),
        lambda: store.size(key_of(1)),
        lambda: list(store.keys()),
        lambda: store.entries(),
        lambda: store.write(key_of(1), [b"value"]),
        lambda: store.delete(key_of(1)),
    ):
        with pytest.raises(StoreError, match="lack the permission"):
            call()
    for command in ("ls", "verify"):
        result = run_command(command, root)
        assert result.exit_code == 2
        assert "lack the permission" in flat(result.stderr)


def test_a_root_that_may_not_be_passed_through_is_refused_on_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if path == "." or str(path).startswith(str(tmp_path / "closed")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    for path in (tmp_path, tmp_path / "closed" / "store"):
        with pytest.raises(StoreError, match="cannot be opened: Permission denied"):
            LocalStore(path)


# What a file claims.


@pytest.fixture
def memory_is_dear(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who asks for much memory at once gets an AssertionError, as a machine without so much would end the process."""
    import resource  # not everywhere

    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.fault(
    "Files",
    "A chunk's file, its header or a pack's manifest claims gigabytes that are not there.",
    "No memory is taken for them; the chunk is a damaged one.",
)
def test_a_file_with_a_hole_of_gigabytes_costs_no_memory(tmp_path: Path, memory_is_dear: None) -> None:
    (key,) = make_chunks(tmp_path / "chunks", 1, tokens=64)
    root = tmp_path / "store"
    LocalStore(root).write(key, [(tmp_path / "chunks" / key).read_bytes()])
    (path,) = root.glob("*/*.safetensors")
    os.truncate(path, 2**36)
    result = verify(LocalStore(root), lambda done, total: None)
    assert [bad.corrupt for bad in result.bad] == [True]
    with pytest.raises(CorruptChunk):
        LocalStore(root).read_into(key, [memoryview(bytearray(99))])


@pytest.mark.parametrize("claim", [2**33, MAX_HEADER_BYTES, 2**63])
def test_a_header_that_claims_gigabytes_costs_no_memory(tmp_path: Path, memory_is_dear: None, claim: int) -> None:
    LocalStore(tmp_path).write(key_of(1), [struct.pack("<Q", claim), b"{}"])
    result = verify(LocalStore(tmp_path), lambda done, total: None)
    assert [bad.corrupt for bad in result.bad] == [True]
    assert run_command("ls", tmp_path).exit_code == 0


def test_a_manifest_that_claims_gigabytes_costs_no_memory(tmp_path: Path, memory_is_dear: None) -> None:
    model = shared_model("llama")
    export_pack(filled_store(model, prompt()), tmp_path, model, prompt(), chunk_size=CHUNK)
    pack = open_folder_pack(tmp_path)
    key = next(pack.keys())
    chunk = pack.manifest.by_key[key]
    object.__setattr__(chunk, "size", 2**36)
    with pytest.raises(CorruptChunk, match="cut short"):
        pack.read(key)
    assert FIRST_READ < 2**30


def test_a_large_chunk_is_verified_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (key,) = make_chunks(tmp_path / "chunks", 1, tokens=64)
    value = (tmp_path / "chunks" / key).read_bytes()
    monkeypatch.setattr("cake_hf.cli.verify.WHOLE_BYTES", 0)
    monkeypatch.setattr("cake_hf.cli.verify.STEP_BYTES", 1000)
    store = LocalStore(tmp_path / "store")
    store.write(key, [value])
    assert verify(store, lambda done, total: None).nbytes == len(value)
    store.write(key, [value[:-1], bytes([value[-1] ^ 1])], replace=True)
    assert len(verify(store, lambda done, total: None).bad) == 1


# Packs in a folder.


@pytest.mark.parametrize("what", ["shard", "chunk", "manifest", "card"])
def test_an_exported_pack_is_not_written_through_links(tmp_path: Path, what: str) -> None:
    model, pack, outside = shared_model("llama"), tmp_path / "pack", tmp_path / "outside"
    source = filled_store(model, prompt())
    export_pack(source, pack, model, prompt(), chunk_size=CHUNK)
    outside.mkdir()
    chunk = next(pack.glob("??/*"))
    path = {"shard": chunk.parent, "chunk": chunk, "manifest": pack / MANIFEST, "card": pack / "README.md"}[what]
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)
    before = snapshot(outside)
    try:
        export_pack(source, pack, model, prompt(), chunk_size=CHUNK)
    except StoreError:
        assert what == "shard"
    assert snapshot(outside) == before
