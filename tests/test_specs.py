"""What a text that names a store means. What looks like a URL and is none makes no directory; the error says what to write."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from cake_hf import CakeCache, LocalStore, StoreError, Tier, import_pack, open_store
from cake_hf.stores import MemoryStore, TierStore
from cake_hf.stores.pack import open_folder_pack
from cake_hf.util.sizes import parse_bytes, parse_seconds
from commands import flat, run_command
from faulty import Faulty
from lent import Lend
from models import shared_model

pytest_plugins = ["lent"]


@pytest.fixture(autouse=True)
def bare_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that is the home directory, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def refusal(spec: object) -> str:
    """The sentence with which something is refused; nothing was made."""
    with pytest.raises(StoreError) as caught:
        open_store(spec)  # type: ignore[arg-type]
    assert os.listdir() == []
    assert str(caught.value).isprintable()
    return str(caught.value)


MISSPELT = [
    ("s3:/bucket/x", "s3://bucket/x"),
    ("s3:bucket", "s3://bucket"),
    ("S3://bucket/x", "s3://bucket/x"),
    ("s3//bucket", "s3://bucket"),
    ("s3a://bucket/x", "s3://bucket/x"),
    ("s3", "s3://bucket/prefix"),
    ("gs:/bucket", "gs://bucket"),
    ("gcs://bucket", "gs://bucket"),
    ("azure:container", "az://container"),
    ("redis:host", "redis://host"),
    ("redis:/host:6379/0", "redis://host:6379/0"),
    ("redis//host", "redis://host"),
    ("REDIS://host", "redis://host"),
    ("reddis:host", "redis://host"),
    ("unix:/run/redis.sock", "redis+unix:///run/redis.sock"),
    ("redis", "redis://host:6379/0"),
    ("hf:/org/pack", "hf://org/pack"),
    ("hf:org/pack@v1", "hf://org/pack@v1"),
    ("HF://org/pack", "hf://org/pack"),
    ("mooncake:/master/x", "mooncake://master/x"),
    ("moncake:master", "mooncake://master"),
    ("Memory:4GB", "memory:4GB"),
    ("mem:4GB", "memory:4GB"),
    ("memory://4GB", "memory:4GB"),
    ("memory", "memory:"),
    ("MEMORY", "memory:"),
    ("pack://folder", "pack:folder"),
    ("Pack:/data/pack", "pack:/data/pack"),
    ("file:/x", "file:///x"),
    ("File:///x", "file:///x"),
    ("file:~/kv", "file://~/kv"),
    ("file//x", "file://{here}/x"),
    ("file:x%20y?budget=1GB", "file://{here}/x%20y?budget=1GB"),
]


@pytest.mark.fault(
    "Stores",
    "A store's scheme is misspelt: `s3:/b`, `S3://b`, `redis:host`, `Memory:4GB`, `memory`.",
    "No directory of that name is made; the error says what to write.",
)
@pytest.mark.parametrize(("spec", "right"), MISSPELT)
def test_a_misspelt_scheme_is_refused_with_the_right_form(spec: str, right: str, bare_home: Path) -> None:
    assert f"write '{right.format(here=bare_home)}'" in refusal(spec)


@pytest.mark.parametrize(
    "spec", ["htp://x", "https://host/kv", "kv:old", "localhost:6379", "://x", ":memory:", "a b:c"]
)
def test_an_unknown_scheme_is_refused_with_all_that_are_known(spec: str) -> None:
    said = refusal(spec)
    assert said.startswith(f"Unknown store URL '{spec}'")
    assert "file:///path, memory:4GB; s3://bucket/prefix" in said


@pytest.mark.fault(
    "Files",
    "A path has options behind it: `~/kv?budget=50GB`.",
    "No directory of that name is made; the error has the URL to write.",
)
@pytest.mark.parametrize(
    ("spec", "right"),
    [
        ("~/kv?budget=50GB", "file://{here}/kv?budget=50GB"),
        ("/data/kv?budget=50GB&eviction=lru", "file:///data/kv?budget=50GB&eviction=lru"),
        ("a dir?ttl=5", "file://{here}/a%20dir?ttl=5"),
        ("kv?", "file://{here}/kv?"),
    ],
)
def test_options_behind_a_path_are_refused_with_the_url(spec: str, right: str, bare_home: Path) -> None:
    assert f"write '{right.format(here=bare_home)}'" in refusal(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("$HOME/kv", "write '~/kv'"),
        ("${HOME}/kv", "write '~/kv'"),
        ("/data/$USER/kv", "write os.path.expandvars('/data/$USER/kv')"),
        ("file:///data/${USER}/kv", "write os.path.expandvars("),
        ("%APPDATA%/kv", "write os.path.expandvars("),
        ("pack:$HOME/pack", "write '~/pack'"),
        ("C:\\kv", "path of Windows"),
        ("c:/kv", "path of Windows"),
        ("\\\\server\\kv", "path of Windows"),
        ("~\\kv", "path of Windows"),
        ("file:///C:/kv", "path of Windows"),
        ("file:///~/kv", "write 'file://~/kv'"),
        ("['memory:', 'kv']", "written in Python"),
        ("", "is empty"),
        (" ", "is empty"),
        ("file://", "is empty"),
        ("file://localhost", "is empty"),
        ("kv\n", r"'kv\n' has a space at an end, or a line break"),
        ("kv ", "'kv ' has a space"),
        ("./kv ", "pass a pathlib.Path"),
        ("redis://host/0\n", "has a space at an end"),
        ("k\x1b[2Jv", r"k\x1b[2Jv"),
        ("k\0v", r"k\x00v"),
        (Path("k\0v"), "character of value 0"),
        (Path("k\ud800v"), "can't encode"),
        ("file:///k%00v", "character of value 0"),
    ],
)
def test_text_that_is_no_directorys_name_is_refused(spec: object, words: str) -> None:
    assert words in refusal(spec)


@pytest.mark.parametrize("host", ["host", "server.example", "data", ".", "127.0.0.1"])
def test_a_directory_of_another_host_is_refused(host: str) -> None:
    said = refusal(f"file://{host}/kv")
    assert "'file:///kv'" in said
    assert f"'file:///{host}/kv'" in said


@pytest.mark.fault(
    "Files",
    "A directory's name has characters in it that mean something in URLs or shells.",
    "As a `pathlib.Path`, with `./` before it, or by `Path.as_uri()` it is a directory like any other.",
)
@pytest.mark.parametrize(
    "name",
    ["memory:4GB", "s3:", "kv?budget=1GB", "$HOME", "~x", "~", "a b", "100%", "%41", "a#b", "C:\\kv", "ü[1]", "memory"],
)
def test_odd_names_are_directories_for_who_says_so(name: str, bare_home: Path) -> None:
    odd = bare_home / "in" / name
    odd.parent.mkdir()
    os.chdir(odd.parent)
    specs = [f"./{name}", odd, odd.as_uri(), f"file://localhost{odd.as_uri()[7:]}", f"{odd.as_uri()}?budget=1GB"]
    for spec in [*specs, *([Path(name)] if name != "~" else [])]:
        store = open_store(spec)
        assert isinstance(store, LocalStore)
        store.check_writable()
        assert store.root.resolve() == odd, spec
    assert os.listdir() == [name]


def test_the_message_says_how_such_a_directory_is_named(bare_home: Path) -> None:
    for name in ("Memory:4GB", "s3:", "$HOME", "C:\\kv"):
        assert f"write './{name}', or pass a pathlib.Path" in refusal(name)
    assert "pass a pathlib.Path" in refusal("/data/kv?")


def test_undecodable_names_and_bytes(bare_home: Path) -> None:
    raw = os.fsencode(bare_home / "in") + b"\xff"
    for spec in (Path(os.fsdecode(raw)), Path(os.fsdecode(raw)).as_uri()):
        store = open_store(spec)
        assert isinstance(store, LocalStore)
        assert os.fsencode(store.root) == raw
    with pytest.raises(StoreError, match="not bytes"):
        open_store(raw)  # type: ignore[arg-type]


def test_a_tilde_is_the_home_directory(bare_home: Path) -> None:
    for spec in ("~/kv", Path("~/kv"), "file://~/kv", "file://~/kv?budget=1GB"):
        store = open_store(spec)
        assert isinstance(store, LocalStore)
        assert store.root == bare_home / "kv"


@pytest.mark.fault("Files", "`~` stands for a home directory that cannot be found.", "One sentence says so.")
@pytest.mark.parametrize("home", [None, "", "relative"])
def test_no_home_directory_is_one_sentence(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_user(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_user)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    for attempt in (
        lambda: open_store("~/kv"),
        lambda: open_store(Path("~/kv")),
        lambda: open_store("file://~/kv"),
        lambda: LocalStore("~/kv"),
        lambda: open_store("pack:~/pack"),
        lambda: open_folder_pack("~/pack"),
    ):
        with pytest.raises(StoreError, match=r"^There is no way to find the home directory.*set HOME") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert os.listdir() == []


def test_an_unknown_user_is_one_sentence() -> None:
    assert "write './~unknown-user/kv'" in refusal("~unknown-user/kv")


# Options.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("budgt=5GB", "no option 'budgt'; known are budget and eviction"),
        ("Budget=5GB", "no option 'Budget'"),
        ("budget=1GB&budget=2GB", "'budget' stands there twice"),
        ("budget", "name=value"),
        ("budget=", "is not a size"),
        ("budget=0", "room for nothing"),
        ("budget=-1", "is not a size"),
        ("budget=abc", "is not a size"),
        ("budget=1e9", "is not a size"),
        ("budget=" + "9" * 400, "is not a size"),
        ("budget=9999999999TB", "is not a size"),
        ("eviction=mru", "mru"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: str, words: str, bare_home: Path) -> None:
    said = refusal(f"file://{bare_home}/kv?{options}")
    assert words in said
    assert len(said) < 300


@pytest.mark.parametrize("spec", ["memory:0", "memory:-1", "memory:much", "memory:" + "9" * 400])
def test_memory_without_a_size_is_refused(spec: str) -> None:
    assert "give a size" in refusal(spec) or "is not a size" in refusal(spec)
    assert "no options" in refusal("memory:4GB?budget=1")


@pytest.mark.parametrize("text", ["9" * 400, "1" * 40 + "w", "99999999999999w"])
def test_numbers_without_bounds_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_seconds(text if text.endswith("w") else f"{text}s")
    with pytest.raises(ValueError, match="is not a"):
        parse_bytes(text)


# Lists.


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            ["memory:", 3],
            "Store 2 of the list cannot be used: A store is a path, a URL, a Store or a list of these, not int",
        ),
        (["memory:", None], "Store 2 of the list cannot be used: It is None"),
        (["memory:", b"kv"], "not bytes"),
        (["mem:4GB"], "write 'memory:4GB'"),
        (["memory:", []], "equally near: one or more"),
        (["memory:", ["memory:", ["memory:"]]], "equally near: one or more, and no lists"),
        (["memory:", "redis://h\ud800/0"], "Store 2 of the list cannot be used: 'redis://h\\ud800/0' has a space"),
        ([], "is empty"),
        ({"kv"}, "not set"),
        ({"near": "kv"}, "not dict"),
    ],
)
def test_a_list_with_a_bad_member_says_which(spec: object, words: str) -> None:
    assert words in refusal(spec)


@pytest.mark.parametrize("store", ["memory:4GB", Path("kv"), None, ["memory:"]])
def test_a_tier_of_what_is_no_store_is_refused(store: object) -> None:
    with pytest.raises(StoreError, match=r"^A tier has a Store in it, not \w+; make one with open_store"):
        Tier(store)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match='True, False or "behind", not'):
        Tier(MemoryStore(), write="later")  # type: ignore[arg-type]


def test_a_list_in_itself_is_refused() -> None:
    endless: list[object] = ["memory:"]
    endless.append(endless)
    assert "no lists" in refusal(endless)


def test_what_was_opened_before_a_bad_member_is_closed(lend: Lend) -> None:
    closed: list[str] = []
    url = lend(lambda: Faulty(MemoryStore(), "close", closed.append))
    refusal([url, [url], 3])
    assert len(closed) == 2
    with open_store([url, [url]]) as store:
        assert isinstance(store, TierStore)
        assert len(closed) == 2


# All that take a text that names a store.


def test_a_cache_refuses_before_anything_is_made() -> None:
    with pytest.raises(StoreError, match="write 'memory:4GB'"):
        CakeCache(shared_model("llama"), "Memory:4GB")
    assert os.listdir() == []


def test_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_HF_STORE", "s3:/bucket")
    with pytest.raises(
        StoreError, match=r"^CAKE_HF_STORE cannot be used: 's3:/bucket' is no store; write 's3://bucket'"
    ):
        open_store()
    monkeypatch.setenv("CAKE_HF_STORE", "~/kv\n")  # what $(cat file) leaves is no part of it
    assert repr(open_store()) == f"LocalStore('{Path.cwd() / 'kv'}')"


@pytest.mark.parametrize("command", ["ls", "info", "verify", "gc"])
@pytest.mark.parametrize(
    ("spec", "right"), [("Memory:4GB", "memory:4GB"), ("s3:/bucket", "s3://bucket"), ("~/kv?budget=1GB", "file://")]
)
def test_commands_say_the_right_form(command: str, spec: str, right: str) -> None:
    told = run_command(command, spec, *(["--budget", "1GB"] if command == "gc" else []))
    assert told.exit_code == 2
    assert f"write '{right}" in flat(told.stderr)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:/org/pack", "write 'hf://org/pack'"),
        ("HF://org/pack", "write 'hf://org/pack'"),
        ("pack://folder", "write 'pack:folder'"),
        ("$HOME/pack", "write '~/pack'"),
        ("pack:", "names no pack's folder"),
        ("pack:s3://bucket", "names no pack's folder"),
        ("s3://bucket/pack", "names no pack's folder"),
        ("memory:", "names no pack's folder"),
        (Path("hf:"), "is no pack: it has no"),
        ("./hf:", "is no pack: it has no"),
    ],
)
def test_packs_are_named_in_the_same_way(source: str | Path, words: str) -> None:
    with pytest.raises(StoreError) as caught:
        import_pack(source, "memory:")
    assert words in str(caught.value)
    assert os.listdir() == []
    if isinstance(source, str):
        told = run_command("pull", source, "memory:")
        assert told.exit_code == 2
        assert words in flat(told.stderr)
