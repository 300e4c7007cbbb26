"""ROUGE-L of summaries as LongBench computes it: what its `rouge` package calls the summary level, on sets of words.

Both texts are cut into sentences at each ".", and sentences into words at spaces. For each pair of a sentence of the answer
and one of the prediction, one longest common subsequence is walked back; U is the set of all words on these walks. With A and
P the sets of words of answer and prediction, recall is |U| / |A|, precision |U| / |P|, and F = 2 p r / (p + r + 1e-8).

The walk decides between subsequences of equal length, so it is part of the definition: from the ends, equal words are taken,
and otherwise the step goes back in the answer only if that is strictly better.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.scores.text import segment

LONGEST_WALK = 989
"""The most steps of a walk that the benchmark's scorer survives. It walks by recursion; beyond Python's default limit of 1000
frames (ten or eleven of which are its callers') it fails, and a failure scores 0. Chinese texts get there first: their full
stop is not the "." to be cut at."""


def rouge_l(prediction: str, answer: str) -> float:
    """Returns F of ROUGE-L; 0 if a text has no sentence at all, or is too long for the benchmark's scorer (`LONGEST_WALK`)."""
    predicted, expected = _sentences(prediction), _sentences(answer)
    if not predicted or not expected:
        return 0.0
    common: set[str] = set()
    for sentence in expected:
        for other in predicted:
            words = common_words(sentence, other)
            if words is None:
                return 0.0
            common |= words
    precision = len(common) / _distinct(predicted)
    recall = len(common) / _distinct(expected)
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """Returns ROUGE-L on the words that jieba finds.

    Raises:
        MissingSegmenter: jieba is not installed.
    """
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(answer)))


def common_words(expected: Sequence[str], predicted: Sequence[str]) -> set[str] | None:
    """Returns the distinct words on the walk along a longest common subsequence; None if the walk is longer than
    `LONGEST_WALK`."""
    lengths = _lengths(expected, predicted)
    row, column, steps, found = len(expected), len(predicted), 0, set()
    while row and column:
        if expected[row - 1] == predicted[column - 1]:
            found.add(expected[row - 1])
            row, column = row - 1, column - 1
        elif lengths[row - 1][column] > lengths[row][column - 1]:
            row -= 1
        else:
            column -= 1
        steps += 1
        if steps > LONGEST_WALK:
            return None
    return found


def _lengths(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Returns `[i][j]`: length of the longest common subsequence of the first i and the first j words."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for column, candidate in enumerate(other):
            row.append(above[column] + 1 if word == candidate else max(above[column + 1], row[column]))
        table.append(row)
    return table


def _sentences(text: str) -> list[list[str]]:
    """Returns the words of each sentence. A sentence of spaces alone is one empty word, as in the benchmark's scorer."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _distinct(sentences: Sequence[Sequence[str]]) -> int:
    return len({word for sentence in sentences for word in sentence})
