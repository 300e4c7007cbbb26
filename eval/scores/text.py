"""F1 over words, as LongBench scores answers to questions.

The F1 is that of two bags of words: with s words in common (each as often as both have it), precision is s / words of the
prediction, recall s / words of the answer, and F1 = 2 p r / (p + r).
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)

_CHINESE_PUNCTUATION = _PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001  # letters that look like others are the point
)
"""What the benchmark drops from Chinese words. An opening 《 is not among it there, and so not here."""


class MissingSegmenter(ImportError):
    """Chinese text cannot be cut into words without jieba."""


def qa_f1(prediction: str, answer: str) -> float:
    """Returns F1 of the words, after lower case, without punctuation and without English articles."""
    return bag_f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """Returns F1 of the words that jieba finds, after lower case and without punctuation.

    Raises:
        MissingSegmenter: jieba is not installed.
    """
    return bag_f1(_chinese_words(prediction), _chinese_words(answer))


def bag_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Returns F1 of two bags of words; 0 if they have nothing in common, also if both are empty."""
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def segment(text: str) -> list[str]:
    """Returns Chinese text as words, in order; nothing is left out.

    Raises:
        MissingSegmenter: jieba is not installed.
    """
    return list(_jieba().cut(text, cut_all=False))


def _words(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


def _chinese_words(text: str) -> list[str]:
    cleaned = (_clean_chinese(word) for word in segment(text))
    return [word for word in cleaned if word]


def _clean_chinese(word: str) -> str:
    return "".join("".join(char for char in word.lower() if char not in _CHINESE_PUNCTUATION).split())


@cache
def _jieba() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is old: escapes and modules that Python has dropped
            import jieba
    except ImportError as error:
        raise MissingSegmenter(
            'Chinese tasks are scored on the words that jieba finds; install it with: pip install "cake-hf[eval]" (or jieba).'
        ) from error
    jieba.setLogLevel("ERROR")  # it announces on stderr that it reads its dictionary
    return jieba
