"""Scores by rule: classes, numbers, places, lines of code, multiple choice. Each compares a prediction with one answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

_NUMBER = re.compile(r"\d+")
_COMMENT_MARKS = ("`", "#", "//")


class BrokenAnswer(ValueError):
    """This score cannot use the answer."""


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Returns 1 / the number of classes that the prediction names, if the answer is among them.

    A named class that is part of the answer's own name is not held against the prediction. The benchmark drops such
    classes from the list while it goes through it, and so passes over the one that moves up; that is kept, since it
    changes scores.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        name = named[position]
        if name in answer and name != answer:
            named.remove(name)
        position += 1
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Returns the share of the prediction's numbers that are the answer; 0 without numbers. "07" is not "7"."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Returns `count` of the number in an answer such as "Paragraph 19".

    Raises:
        BrokenAnswer: the answer names no paragraph.
    """
    return count(prediction, _place(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """Returns `count` of the number in an answer such as "段落19".

    Raises:
        BrokenAnswer: the answer names no paragraph.
    """
    return count(prediction, _place(r"段落(\d+)", answer))


def code_similarity(prediction: str, answer: str) -> float:
    """Returns how alike the prediction's first line of code and the answer are, in whole hundredths.

    The first line is the first one without a backtick, "#" or "//". Likeness is difflib's ratio, 2 M / T with M the
    characters in matching blocks and T those of both; difflib passes over characters that are popular in lines of 200
    and more.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _COMMENT_MARKS)), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def choice(prediction: str, answer: str) -> float:
    """Scores LongBench v2: whether "The correct answer is (X)", also without parentheses, names the answer; "*" is dropped."""
    plain = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(r"The correct answer is ([A-D])", plain)
    return float(found is not None and found[1] == answer)


def contains(prediction: str, answer: str) -> float:
    """Returns whether the prediction contains the answer's text."""
    return float(answer in prediction)


def _place(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if found is None:
        raise BrokenAnswer(f"the answer {answer!r} names no paragraph")
    return found[1]
