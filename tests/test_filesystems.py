"""What a filesystem need not have: links, locks, syncs of directories, sizes ahead, renames of open files, direct reads."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cake_hf import LocalStore, StoreError
from cake_hf.cli.gc import collect, select
from cake_hf.stores import locks
from cake_hf.stores.byte_count import ByteCount
from cake_hf.stores.partial import LEFTOVER_SECONDS
from cake_hf.testing.contract import key_of, value_of
from children import start_child
from waiting import PATIENCE

REFUSALS = [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EIO, errno.ENOTTY]


class Refused:
    """Lets calls fail, as on a filesystem that does not know them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __call__(self, module: Any, name: str, number: int, when: Callable[..., bool] = lambda *a, **o: True) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if when(*arguments, **options):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        self._patch.setattr(module, name, call)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Refused:
    return Refused(monkeypatch)


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def no_links(refused: Refused, number: int) -> None:
    refused(os, "link", number)


def no_sync_of_directories(refused: Refused, number: int) -> None:
    refused(os, "fsync", number, is_directory)


def no_size_ahead(refused: Refused, number: int) -> None:
    refused(os, "ftruncate", number)


def no_locks(refused: Refused, number: int) -> None:
    refused(fcntl, "flock", number)


def no_dates(refused: Refused, number: int) -> None:
    refused(os, "utime", number)


def no_direct_reads(refused: Refused, number: int) -> None:
    refused(fcntl, "fcntl", number, lambda descriptor, what, *more: what == fcntl.F_SETFL)


def no_reads_without_waiting(refused: Refused, number: int) -> None:
    refused(os, "preadv", number, lambda *arguments: len(arguments) > 3)


def no_writes_in_place(refused: Refused, number: int) -> None:
    refused(os, "pwrite", number)


def no_priorities(refused: Refused, number: int) -> None:
    refused(os, "setpriority", number)


def nothing_of_all_that(refused: Refused, number: int) -> None:
    for refuse in OPTIONAL[:-1]:
        refuse(refused, number)


OPTIONAL = [
    no_links,
    no_sync_of_directories,
    no_size_ahead,
    no_locks,
    no_dates,
    no_direct_reads,
    no_reads_without_waiting,
    no_writes_in_place,
    no_priorities,
    nothing_of_all_that,
]


def use(root: Path) -> None:
    """A store's life: values come, are replaced, are listed, make room, and go."""
    store, big = LocalStore(root, budget=4_000_000), os.urandom(2**20)
    store.check_writable()
    assert store.write(key_of(1), [big]) is True
    assert store.write(key_of(1), [value_of(2)]) is False
    assert store.read(key_of(1)) == big
    assert store.write(key_of(1), [value_of(1)], replace=True) is True
    assert store.read(key_of(1)) == value_of(1)
    for number in range(2, 7):
        assert store.write(key_of(number), [big]) is True
        assert sum(entry.nbytes for entry in store.entries()) <= 4_000_000
    other = LocalStore(root, budget=4_000_000)
    assert other.read(key_of(6)) == big
    assert other.delete(key_of(6)) is True
    assert other.read(key_of(6)) is None
    selection = select(other, 0, None, "lru", 2e9, lambda done, total: None)
    assert collect(other, selection, lambda done, total: None).failed == {}
    assert list(other.keys()) == []
    assert os.listdir(root / "partial") == []
    assert not (root / "bytes.lock").exists()
    assert int((root / "bytes").read_text()) == 0


@pytest.mark.fault(
    "Files",
    "The filesystem has no hard links, no locks, no syncs of directories, no sizes ahead, no direct reads or no dates.",
    "Each is done without: a rename instead of a link, a lock file instead of a lock.",
)
@pytest.mark.parametrize("number", REFUSALS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("refuse", OPTIONAL)
def test_what_a_filesystem_need_not_have(
    tmp_path: Path, refused: Refused, refuse: Callable[[Refused, int], None], number: int
) -> None:
    refuse(refused, number)
    if number == errno.EIO and refuse in (no_sync_of_directories, nothing_of_all_that):
        with pytest.raises(StoreError, match="disk reports a fault"):  # no refusal: a disk that is broken
            use(tmp_path)
        assert list(LocalStore(tmp_path).keys()) == []
    else:
        use(tmp_path)


def test_a_sync_of_a_file_that_is_not_known_is_done_without(tmp_path: Path, refused: Refused) -> None:
    refused(os, "fsync", errno.EINVAL)
    use(tmp_path)


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_is_closed_before_it_is_renamed(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    no_links(refused, errno.EPERM)
    store, rename = LocalStore(tmp_path), os.rename
    store.write(key_of(1), [b"old"]) if replace else None
    files: set[int] = set()

    def rename_closed(name: str, other: str, **options: int) -> None:
        inode = os.stat(name, dir_fd=options["src_dir_fd"]).st_ino
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                files.add(os.fstat(int(descriptor)).st_ino)
            except OSError:
                continue
        assert inode not in files
        rename(name, other, **options)

    monkeypatch.setattr(os, "rename", rename_closed)
    assert store.write(key_of(1), [value_of(1)], replace=replace) is True
    assert files


def test_bytes_that_are_found_missing_when_a_file_is_closed_are_no_chunk(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounts of object storage send a file when it is closed."""
    no_links(refused, errno.ENOSYS)
    store, close = LocalStore(tmp_path), os.close
    store.check_writable()

    def fail(descriptor: int) -> None:
        written = stat.S_ISREG((status := os.fstat(descriptor)).st_mode) and status.st_size == 1000
        close(descriptor)
        if written:
            raise OSError(errno.EIO, "not sent")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fail)
        with pytest.raises(StoreError, match="disk reports a fault"):
            store.write(key_of(1), [value_of(1)])
    assert list(store.keys()) == []
    assert os.listdir(tmp_path / "partial") == []


# Locks.


class Forgetful(set[str]):
    """Has nothing."""

    def add(self, element: str) -> None:
        pass


def test_where_nothing_can_be_locked_a_living_writers_file_stays_and_an_old_one_goes(
    tmp_path: Path, refused: Refused
) -> None:
    no_locks(refused, errno.ENOSYS)
    store = LocalStore(tmp_path)
    store.check_writable()
    young, old = (tmp_path / "partial" / f"{key_of(number)}.0123456789abcdef" for number in (1, 2))
    for path in (young, old):
        path.write_bytes(b"half")
    status = old.stat()
    os.utime(old, (status.st_atime, status.st_mtime - LEFTOVER_SECONDS - 1))
    assert store.sweep() == 1
    assert young.exists()


def test_a_lock_file_keeps_others_out(tmp_path: Path, refused: Refused) -> None:
    no_locks(refused, errno.EOPNOTSUPP)
    with ByteCount(tmp_path / "bytes").opened(create=True) as balance:
        assert balance is not None
        other = ByteCount(tmp_path / "bytes", patience=0.01)
        with pytest.raises(StoreError, match="has held the lock"), other.opened():
            raise AssertionError("the lock was given twice")
    with ByteCount(tmp_path / "bytes").opened() as balance:
        assert balance is not None


def test_a_dead_holders_lock_file_is_removed(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(refused, errno.EOPNOTSUPP)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.01)
    (tmp_path / "bytes.lock").touch()
    assert LocalStore(tmp_path, budget=10**6).write(key_of(1), [value_of(1)])
    assert not (tmp_path / "bytes.lock").exists()


FORKER = """
from cake_hf.stores.local import LocalStore
import signal, time
store = LocalStore(sys.argv[1], budget=10**6)
fsync = os.fsync
def fork_first(descriptor):
    os.fsync = fsync
    told, tells = os.pipe()
    child = os.fork()
    if not child:
        os.write(tells, b"x")  # what it inherited is let go
        time.sleep(600)
        os._exit(0)
    os.read(told, 1)
    print(child, flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = fork_first
store.write("f" * 40, [bytes(1000)])
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Gives a function that starts a process which forks in the middle of a write; the child of the fork lives on."""
    processes, children = [], []

    def start(what: str) -> subprocess.Popen[str]:
        process = start_child(FORKER, tmp_path, what)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdin is not None
        children.append(int(process.stdout.readline()))
        process.stdin.write("go on\n")
        process.stdin.flush()
        return process

    yield start
    for child in children:
        os.kill(child, 9)
    for process in processes:
        process.communicate("")


@pytest.mark.fault(
    "Processes",
    "A process forks while it writes, and the child lives on.",
    "The child holds none of its parent's locks: leftovers are swept, and no process waits for it.",
)
@pytest.mark.parametrize("what", ["dies", "goes on"])
def test_a_child_of_fork_holds_no_lock(
    tmp_path: Path, forked: Callable[[str], subprocess.Popen[str]], what: str
) -> None:
    process = forked(what)
    if what == "dies":
        assert process.wait(PATIENCE) == -9
        assert len(os.listdir(tmp_path / "partial")) == 1
    else:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
    store = LocalStore(tmp_path, budget=10**6)
    assert store.write(key_of(2), [value_of(2)])
    assert os.listdir(tmp_path / "partial") == []


def test_a_fork_inside_the_account_leaves_it_free(tmp_path: Path) -> None:
    """Also where the parent goes on only after the child: the lock is given back, not only closed."""
    told, tells = os.pipe()
    with ByteCount(tmp_path / "bytes").opened(create=True) as balance:
        assert balance is not None
        child = os.fork()
        if not child:
            os.read(told, 1)
            os._exit(0)
    try:
        with ByteCount(tmp_path / "bytes", patience=1.0).opened() as balance:
            assert balance is not None
    finally:
        os.write(tells, b".")
        os.waitpid(child, 0)
        os.close(told)
        os.close(tells)


# A wiped root.


@pytest.mark.fault(
    "Files",
    "The store's directory is removed while it is in use.",
    "Reads are misses; the next write makes it again.",
)
@pytest.mark.parametrize("budget", [None, 10**6])
def test_a_wiped_root_is_made_again(tmp_path: Path, budget: int | None) -> None:
    root = tmp_path / "store"
    store = LocalStore(root, budget=budget)
    for _ in range(2):
        assert store.write(key_of(1), [value_of(1)])
        shutil.rmtree(root)
        assert store.contains([key_of(1)]) == [False]
        assert store.read(key_of(1)) is None
        assert store.read_range(key_of(1), [memoryview(bytearray(9))], 0) is False
        assert store.size(key_of(1)) is None
        assert store.delete(key_of(1)) is False
        assert list(store.keys()) == store.entries() == []
        assert store.sweep() == 0
    assert store.write(key_of(2), [value_of(2)])
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert list(store.keys()) == [key_of(2)]


@pytest.mark.parametrize("name", ["partial", key_of(1)[:2], "bytes"])
def test_a_part_that_is_wiped_is_made_again(tmp_path: Path, name: str) -> None:
    store = LocalStore(tmp_path, budget=10**6)
    store.write(key_of(1), [value_of(1)])
    shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    assert store.write(key_of(1), [value_of(1)], replace=True)
    assert store.read(key_of(1)) == value_of(1)


@pytest.mark.parametrize("what", ["root", "partial"])
@pytest.mark.parametrize("replace", [False, True])
def test_what_is_wiped_in_the_middle_of_a_write_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, replace: bool
) -> None:
    root, fsync = tmp_path / "store", os.fsync
    store = LocalStore(root)

    def wipe(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        shutil.rmtree(root if what == "root" else root / "partial")

    monkeypatch.setattr(os, "fsync", wipe)
    assert store.write(key_of(1), [value_of(1)], replace=replace)
    assert store.read(key_of(1)) == value_of(1)


def test_a_sweep_between_close_and_rename_costs_a_second_try(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soak found it."""
    no_links(refused, errno.EPERM)
    store, sweeper, rename, swept = LocalStore(tmp_path), LocalStore(tmp_path), os.rename, []
    monkeypatch.setattr("cake_hf.stores.folder.being_written", Forgetful())  # as if the sweeper were another process

    def sweep_first(name: str, other: str, **options: int) -> None:
        if not swept:
            swept.append(sweeper.sweep())
        rename(name, other, **options)

    monkeypatch.setattr(os, "rename", sweep_first)
    assert store.write(key_of(1), [value_of(1)]) is True
    assert swept == [1]
    assert store.read(key_of(1)) == value_of(1)


# Real mounts. They need programs that Debian's packages of the same names bring, and /dev/fuse.

Mount = Callable[[Path, Path], tuple[list[str], list[str]]]
"""From an empty directory for what is below and the place to mount at: the commands before, and the one that mounts."""


def rclone(mode: str) -> Mount:
    def commands(below: Path, at: Path) -> tuple[list[str], list[str]]:
        cache = ["--config", "/dev/null", "--cache-dir", str(below.parent / "cache"), "--vfs-cache-mode", mode]
        return [], [
            "rclone",
            "mount",
            f":local:{below}",
            str(at),
            *cache,
            "--dir-cache-time",
            "0s",
        ]

    return commands


def mergerfs(below: Path, at: Path) -> tuple[list[str], list[str]]:
    for name in ("a", "b"):
        (below / name).mkdir()
    return [], ["mergerfs", "-f", "-o", "category.create=rand", f"{below / 'a'}:{below / 'b'}", str(at)]


def bindfs(below: Path, at: Path) -> tuple[list[str], list[str]]:
    return [], ["bindfs", "-f", str(below), str(at)]


def exfat(below: Path, at: Path) -> tuple[list[str], list[str]]:
    """Wants a block device, which is attached to the file for that."""
    attach = 'device=$(losetup -f --show "$0") && trap "losetup -d $device" EXIT && mount.exfat-fuse -d "$device" "$1"'
    return ["mkfs.exfat", str(_disk(below))], ["bash", "-c", attach, str(_disk(below)), str(at)]


def ntfs(below: Path, at: Path) -> tuple[list[str], list[str]]:
    return ["mkntfs", "-F", "-Q", str(_disk(below))], ["ntfs-3g", "-o", "no_detach", str(_disk(below)), str(at)]


def _disk(below: Path) -> Path:
    disk = below / "disk"
    if not disk.exists():
        with disk.open("wb") as file:
            file.truncate(2**25)
    return disk


MOUNTS: dict[str, Mount] = {
    "rclone without a cache": rclone("off"),
    "rclone with a cache": rclone("full"),
    "mergerfs": mergerfs,
    "bindfs": bindfs,
    "exfat": exfat,
    "ntfs": ntfs,
}


@contextmanager
def mounted(mount: Mount, tmp_path: Path) -> Iterator[Path]:
    """The mount point; skips, with the reason, where that cannot be had here."""
    below, at = tmp_path / "below", tmp_path / "mount"
    below.mkdir()
    at.mkdir()
    prepare, command = mount(below, at)
    tools = ["mount.exfat-fuse", "losetup"] if command[0] == "bash" else []
    for tool in (command[0], *prepare[:1], *tools, "fusermount3"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"{tool} is not installed")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be used here")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    if prepare:
        subprocess.run(prepare, check=True, capture_output=True, env=environment, timeout=PATIENCE)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        ticks = threading.Event()
        while not os.path.ismount(at):
            if process.poll() is not None:
                pytest.skip(f"{' '.join(command[:2])} mounts nothing here (exit code {process.returncode})")
            ticks.wait(0.01)
        yield at
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(at)], check=False, capture_output=True, timeout=PATIENCE)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)


@pytest.mark.parametrize("name", MOUNTS)
def test_a_store_works_on_each_mounted_filesystem(tmp_path: Path, name: str) -> None:
    with mounted(MOUNTS[name], tmp_path) as at:
        use(at / "store")
        store, other = LocalStore(at / "store"), LocalStore(at / "store")
        writers = [threading.Thread(target=one.write, args=(key_of(1), [value_of(1)])) for one in (store, other)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(PATIENCE)
        assert store.read(key_of(1)) == value_of(1)
        assert os.listdir(at / "store" / "partial") == []
