"""Kinds of stores that installed packages bring along as entry points; here packages are folders that a test makes."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from cake_hf import CakeCache, MemoryStore, StoreError, TierStore, open_store
from cake_hf.stores import plugins
from cake_hf.testing.contract import key_of
from models import CHUNK, prompt, shared_model
from snippets import snippets

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding-a-store.md"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package: its name, its entry points as text, and the source of its module."""
    before = set(sys.modules)

    def new(package: str, entry_points: str, source: str = "", module: str = "") -> None:
        folder = tmp_path / package
        told = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        told.mkdir(parents=True)
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (told / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{entry_points}\n")
        (folder / f"{module or package.replace('-', '_')}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    yield new
    for name in set(sys.modules) - before:
        if name.startswith(("shelf", "my_package")):
            del sys.modules[name]


SHELF = """
from cake_hf import MemoryStore, StoreError
opened = []
def open_shelf(url):
    if url.endswith("/locked"):
        raise StoreError("The shelf is locked; unlock it.")
    opened.append(url)
    return MemoryStore()
"""


def test_a_url_of_the_scheme_opens_the_store(install: Install) -> None:
    install("shelf", "shelf = shelf:open_shelf", SHELF)
    with open_store("shelf://room/top?row=3") as store:
        assert isinstance(store, MemoryStore)
    assert sys.modules["shelf"].opened == ["shelf://room/top?row=3"]


def test_it_is_a_store_wherever_one_is_named(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("shelf", "shelf+disk = shelf:open_shelf", SHELF)
    with open_store(["memory:1MB", "shelf+disk://room"]) as tiers:
        assert isinstance(tiers, TierStore)
        tiers.write(key_of(1), [b"value"])
        assert tiers.flush(60)
    monkeypatch.setenv("CAKE_HF_STORE", "shelf+disk://other")
    open_store().close()
    monkeypatch.chdir(tmp_path)
    with CakeCache(shared_model("llama"), "shelf+disk://kv", chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        assert cache.flush(60)
        assert cache.report.chunks_saved == 8
        assert cache.report.store == "shelf+disk://kv"
    assert sys.modules["shelf"].opened == ["shelf+disk://room", "shelf+disk://other", "shelf+disk://kv"]


def test_nothing_is_looked_for_where_the_text_names_a_store_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(**_: object) -> None:
        raise AssertionError("the installed packages were searched")

    monkeypatch.setattr(metadata, "entry_points", never)
    monkeypatch.setattr(metadata, "distributions", never)
    monkeypatch.chdir(tmp_path)
    for spec in (
        "memory:",
        f"file://{tmp_path}/kv",
        str(tmp_path / "kv"),
        "./kv",
        "some/kv",
        tmp_path / "x",
        "redis://x",
    ):
        open_store(spec).close()


def test_a_module_is_imported_when_a_url_asks_for_it(install: Install) -> None:
    install("shelf", "shelf = shelf:open_shelf", SHELF)
    install("shelf-two", "other = shelf_two:open_shelf", "raise RuntimeError('imported')")
    with pytest.raises(StoreError, match="Unknown store URL"):
        open_store("shell://x/y/z://")
    assert not {"shelf", "shelf_two"} & set(sys.modules)
    open_store("shelf://x").close()
    assert "shelf_two" not in sys.modules


def test_what_is_installed_is_among_what_can_be_opened(install: Install) -> None:
    install("shelf", "shelf = shelf:open_shelf [wood]", SHELF)
    with pytest.raises(StoreError) as caught:
        open_store("gopher://x")
    assert 'shelf://... (pip install "shelf[wood]")' in str(caught.value)
    assert 'mooncake://... (pip install "cake-hf[mooncake]")' in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "right"),
    [("shelf:/a/b", "shelf://a/b"), ("Shelf://a", "shelf://a"), ("shelf", "shelf://..."), ("shefl:a", "shelf://a")],
)
def test_a_misspelt_scheme_of_a_plugin_is_no_directory(
    spec: str, right: str, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("shelf", "shelf = shelf:open_shelf", SHELF)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(StoreError, match=re.escape(f"write '{right}'")):
        open_store(spec)
    assert list((tmp_path / "here").iterdir()) == []


BROKEN = {
    "no such module": ("shelf = shelf_gone:open_shelf", SHELF, "cannot be loaded (No module named 'shelf_gone')"),
    "no such name": ("shelf = shelf:open_drawer", SHELF, "cannot be loaded (module 'shelf' has no attribute"),
    "not well-formed": ("shelf = shelf:open shelf()", SHELF, "cannot be loaded ("),
    "a fault in the source": ("shelf = shelf:open_shelf", "def open_shelf(:", "cannot be loaded (invalid syntax"),
    "an error on import": (
        "shelf = shelf:x",
        "raise OSError('libshelf.so.1:\\nnot found')",
        "(libshelf.so.1:\\nnot found)",
    ),
    "an error without words": ("shelf = shelf:x", "assert False", "cannot be loaded (AssertionError)"),
    "ends the process": ("shelf = shelf:x", "raise SystemExit('no licence')", "cannot be loaded (no licence)"),
    "a missing client": (
        "shelf = shelf:x [wood]",
        "import shelf_client",
        "'shelf_client'): pip install \"shelf[wood]\".",
    ),
    "no function": ("shelf = shelf:x", "x = 3", "cannot open shelf://a: 'int' object is not callable."),
    "fails": ("shelf = shelf:x", "def x(url): raise KeyError('row')", "cannot open shelf://a: 'row'."),
    "wants more": ("shelf = shelf:x", "def x(url, row): pass", "cannot open shelf://a: x() missing 1 required"),
    "makes nothing": ("shelf = shelf:x", "def x(url): pass", "has made no Store of shelf://a, but None."),
    "makes a dict": ("shelf = shelf:x", "def x(url): return {}", "has made no Store of shelf://a, but a dict."),
}


@pytest.mark.fault(
    "Stores",
    "A package that brings a kind of store is broken: it cannot be imported, lacks a library, fails, or makes no store.",
    "Opening the store is an error of one sentence that names the package.",
)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_one_sentence(kind: str, install: Install) -> None:
    entry_points, source, words = BROKEN[kind]
    install("shelf", entry_points, source)
    with pytest.raises(StoreError) as caught:
        open_store("shelf://a")
    said = str(caught.value)
    assert said.startswith("The plugin for shelf:// of the package shelf ")
    assert words in said
    assert said.isprintable()
    assert "Traceback" not in said
    open_store("memory:").close()


def test_a_plugin_s_own_error_passes_as_it_is(install: Install) -> None:
    install("shelf", "shelf = shelf:open_shelf", SHELF)
    with pytest.raises(StoreError, match=r"^The shelf is locked; unlock it\.$"):
        open_store("shelf://room/locked")


@pytest.mark.parametrize(
    "words", ["f'cannot parse {url}'", "'the password verysecret is wrong'", "'login failed', url"]
)
def test_a_broken_plugin_says_no_password(words: str, install: Install) -> None:
    install("shelf", "shelf = shelf:x", f"def x(url): raise ValueError({words})")
    with pytest.raises(StoreError) as caught:
        open_store("shelf://user:verysecret@a/b")
    assert "verysecret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_user_s_interrupt_is_no_fault_of_the_plugin(install: Install) -> None:
    install("shelf", "shelf = shelf:x", "def x(url): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        open_store("shelf://a")


def test_two_packages_with_one_scheme_are_both_named(install: Install) -> None:
    install("shelf", "shelf = shelf:open_shelf", SHELF)
    install("shelf-two", "shelf = shelf_two:open_shelf", SHELF)
    with pytest.raises(
        StoreError, match=r"^Stores at shelf:// are brought by several packages \(shelf-two, shelf\); unin"
    ):
        open_store("shelf://a")


def test_a_scheme_of_ours_cannot_be_replaced(install: Install, tmp_path: Path) -> None:
    names = ("memory", "file", "pack", "redis", "s3")
    install("shelf", "\n".join(f"{name} = shelf:open_shelf" for name in names), SHELF)
    open_store("memory:").close()
    open_store(f"file://{tmp_path}/kv").close()
    open_store("redis://x").close()
    assert "shelf" not in sys.modules


@pytest.mark.parametrize("name", ["x", "C", "Shelf", "my shelf", "shelf/top", "1shelf", "..", "shelf:"])
def test_a_name_that_is_no_scheme_is_left_out(name: str, install: Install) -> None:
    install("shelf", f"{name} = shelf:open_shelf", SHELF)
    assert list(plugins.plugins()) == ["mooncake"]


@pytest.mark.parametrize("broken", [b"\xff\xfe[no text", b"no section = 3\n", b"[cake_hf.stores]\nno value\n"])
def test_another_package_s_broken_metadata_hide_no_plugin(broken: bytes, install: Install, tmp_path: Path) -> None:
    install("shelf", "shelf = shelf:open_shelf", SHELF)
    install("shelf-two", "")
    (tmp_path / "shelf-two" / "shelf_two-1.0.dist-info" / "entry_points.txt").write_bytes(broken)
    open_store("shelf://a").close()


def test_mooncake_is_declared_as_others_declare_theirs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][plugins.GROUP] == {plugins.OURS.name: plugins.OURS.value}
    assert set(plugins.OURS.extras) <= set(project["optional-dependencies"])


def test_the_page_s_example_is_a_plugin(install: Install) -> None:
    [declared] = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    points = tomllib.loads(declared)["project"]["entry-points"][plugins.GROUP]
    whole = snippets(PAGE)
    source = "\n".join([whole[0], *(part for part in whole if "def open_dict_store" in part)])
    install("my-package", "\n".join(f"{name} = {value}" for name, value in points.items()), source)
    with open_store("dict://one") as one, open_store("dict://two") as two:
        one.write(key_of(1), [b"value"])
        assert one.contains([key_of(1)]) == [True]
        assert two.contains([key_of(1)]) == [False]
        assert open_store("dict://one") is one
