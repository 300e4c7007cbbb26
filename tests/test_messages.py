"""docs/troubleshooting.md explains what the library says, all of it, and nothing that it does not say any more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import messages

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"


def plain(message: str) -> str:
    """A message without the gap, and the end of the sentence, that it may end with."""
    return re.sub(r"[.\s]+$", "", " ".join(message.split()))


def told() -> list[str]:
    """The messages of the page about troubleshooting: headings, and first cells of tables."""
    text = PAGE.read_text(encoding="utf-8")
    return [found[2].strip() for found in re.finditer(r"^(?:### |\| )(`+)(.+?)\1(?: \||$)", text, re.MULTILINE)]


def gone(explained: list[str], said: set[str]) -> list[str]:
    """What is explained and not said."""
    return [
        message
        for message, begin in zip(explained, map(plain, explained), strict=True)
        if not any(begin in text for text in said)
    ]


def untold(said: Iterator[str]) -> list[str]:
    """What is said and not explained."""
    begins = [plain(message) for message in told()]
    return [text for text in messages.worth_a_line(said) if not any(plain(text).startswith(begin) for begin in begins)]


def test_messages_that_are_explained_are_still_said() -> None:
    said = {plain(text) for text in messages.every_text()}
    assert len(told()) > 100
    assert gone(told(), said) == []
    assert gone(["A chunk went astray. ..."], said) == ["A chunk went astray. ..."]


def test_every_warning_is_explained() -> None:
    logged = [text for module in messages.sources().values() for text in messages.logged(module)]
    assert len(logged) > 8
    assert untold(iter(logged)) == []


def codes_on_page() -> set[tuple[str, str]]:
    """The code and the message, without its end, of each row of the table about reasons."""
    rows = re.finditer(r"^\| (`+)(.+?)\1 \| `([a-z-]+)` \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {(row[3], plain(row[2])) for row in rows}


def without_row(refusals: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """The refusals without a row for their text and code; a text that is put together needs only one for the code."""
    rows = codes_on_page()
    return [
        (code, text)
        for code, text in refusals
        if not any(code == known and plain(text).startswith(begin * bool(text)) for known, begin in rows)
    ]


def test_every_refusal_has_a_row_with_its_text_and_code() -> None:
    found = [found for module in messages.sources().values() for found in messages.refusals(module)]
    assert len(found) > 60
    assert without_row(iter(found)) == [("store-mismatch", "")]  # the store's own words
    assert {code for code, _ in codes_on_page()} == {code for code, _ in found} - {"store-mismatch"}
    texts = [text for _, text in found if text]
    assert len(texts) == len(set(texts))


def test_every_mismatch_of_a_pack_is_explained() -> None:
    found = [*messages.mismatches(messages.sources()["stores/mismatch.py"])]
    assert len(found) > 8
    assert untold(iter(found)) == []


def test_every_error_that_reaches_people_is_explained() -> None:
    """A new one needs a line in docs/troubleshooting.md: what it means to who reads it, and what to do."""
    found = [text for module in messages.sources(for_users=True).values() for text in messages.raised(module)]
    assert len(found) > 50
    assert untold(iter(found)) == []


def test_a_message_that_is_not_explained_is_noticed() -> None:
    module = ast.parse(
        'logger.warning("Something new: %s", error)\nraise StoreError(f"The {x} is new: {y}")\n'
        'refusal = Refusal("new", f"{x} is new here")'
    )
    assert untold(messages.logged(module)) == ["Something new: ..."]
    assert untold(messages.raised(module)) == ["The ... is new: ..."]
    assert without_row(messages.refusals(module)) == [("new", "... is new here")]
