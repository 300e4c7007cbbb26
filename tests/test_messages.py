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


def test_every_reason_is_explained() -> None:
    speak = ("cache/", "serving/", "stores/mismatch", "model/ranks")
    files = {name: module for name, module in messages.sources().items() if name.startswith(speak)}
    found = [text for module in files.values() for text in messages.reasons(module)]
    assert len(found) > 20
    assert untold(iter(found)) == []


def test_every_error_that_reaches_people_is_explained() -> None:
    """A new one needs a line in docs/troubleshooting.md: what it means to who reads it, and what to do."""
    found = [text for module in messages.sources(for_users=True).values() for text in messages.raised(module)]
    assert len(found) > 50
    assert untold(iter(found)) == []


def test_a_message_that_nobody_explains_is_noticed() -> None:
    module = ast.parse(
        'logger.warning("Something new: %s", error)\nraise StoreError(f"The {x} is new: {y}")\n'
        'report.reason = f"{x} is new here" if new else ""'
    )
    assert untold(messages.logged(module)) == ["Something new: ..."]
    assert untold(messages.raised(module)) == ["The ... is new: ..."]
    assert untold(messages.reasons(module)) == ["... is new here"]
