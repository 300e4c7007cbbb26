"""What comes from outside is printed as it is: neither as markup, nor as an emoji, nor as a command to the terminal."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.figures import Result
from benchmarks.table import build_tables
from cake_hf import LocalStore, StoreError
from cake_hf.cli import gc, warm
from cake_hf.cli.console import console, errors, progress_bar
from cake_hf.cli.gc import Collected
from cake_hf.cli.inspect_store import Inventory
from cake_hf.cli.look_commands import totals
from cake_hf.cli.verify import BadChunk, Verified, show_verified
from cake_hf.testing.contract import key_of
from commands import flat, run_command
from faulty import raising
from lent import Lend

pytest_plugins = ["lent"]

ODD = ["kv[bold]", "kv [/red] x", "[link=http:x]kv[/link]", ":smile: kv", "kv[/]", "[", "a[b]", "[1, 2]"]


@pytest.mark.fault(
    "Files",
    "A path, a key or a server's message has brackets in it, or the name of an emoji, or control characters.",
    "It is printed as it is; what would command the terminal is printed as an escape.",
)
@pytest.mark.parametrize("name", ODD)
def test_a_path_is_printed_as_it_is(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    result = run_command("ls", root)
    assert result.exit_code == 2
    assert f"There is no store at {root};" in flat(result.stderr)
    root.mkdir(parents=True)
    (root / "photo.jpg").touch()
    assert f"The directory {root} is no store" in flat(run_command("verify", root).stderr)
    (root / "photo.jpg").unlink()
    LocalStore(root).check_writable()
    assert name in flat(run_command("info", root).output)
    assert run_command("gc", root, "--budget", "1KB").exit_code == 0


@pytest.mark.parametrize("name", ODD)
def test_all_that_people_are_shown_takes_text_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with console.capture() as shown:
        console.print(f"from {name}")
        console.print(totals(name, Inventory()))
        show_verified(Verified(1, 1, []), [BadChunk(key_of(1), f"why {name}", corrupt=True)], 0)
        gc.show_collected(Collected([], 0, {key_of(1): f"failed {name}"}, 0))
        console.print(build_tables([Result(f"title {name}", {}, failure=f"left out {name}")]))
    text = flat(shown.get())
    for begin in ("from", "store", "why", "failed", "title", "left out"):
        assert f"{begin} {name}" in text
    with errors.capture() as shown:
        errors.print(f"server says {name}", style="bold red")
    assert f"server says {name}" in shown.get()


def test_a_progress_bar_takes_its_title_as_it_is() -> None:
    with progress_bar("[/red] reading", "[chunks]") as show:
        show(1, 2)


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\udcff", "\u202e"])
def test_an_error_does_not_command_the_terminal(lend: Lend, text: str) -> None:
    result = run_command("ls", lend(raising(lambda: StoreError(f"The server says {text}!"))))
    assert result.exit_code == 2
    assert f"The server says {ascii(text)[1:-1]}!" in result.stderr
    assert text not in result.stderr


def test_no_text_of_ours_counts_on_markup() -> None:
    """Consoles do not read it, so a tag would be shown."""
    package = Path(warm.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [
                    f"{path.name}: {node.value}"
                    for tag in ("[bold", "[green", "[red]", "[/", "[dim")
                    if tag in node.value
                ]
    assert found == []
