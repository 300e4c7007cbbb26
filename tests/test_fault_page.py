"""docs/faults.md says what the tests show, and nothing else."""

from __future__ import annotations

import pytest

from scripted import load_script

SCRIPT = load_script("faults")


def test_the_page_is_what_the_tests_say() -> None:
    assert SCRIPT.PAGE.read_text(encoding="utf-8") == SCRIPT.page(), "run python scripts/faults.py"


def test_a_marked_test_is_a_row() -> None:
    source = '@pytest.mark.fault("Stores", "It burns.", "It is put out.")\ndef test_fire() -> None: ...'
    assert list(SCRIPT.faults_of(source, "test_x.py")) == [
        ("Stores", "It burns.", "It is put out.", "test_x.py::test_fire")
    ]


@pytest.mark.parametrize("texts", ['"Fire", "a", "b"', '"Stores", "a"'])
def test_a_mark_that_makes_no_row_is_refused(texts: str) -> None:
    with pytest.raises(ValueError, match="two texts"):
        list(SCRIPT.faults_of(f"@pytest.mark.fault({texts})\ndef test_fire() -> None: ...", "test_x.py"))
