"""Hides small facts in real source code and asks for them again.

A key-value cache that loses, moves or mixes up entries still lets a model write
fluent text, so fluent text proves nothing.  A fact hidden thousands of tokens back
is better evidence: the model recalls it only if the cached entries are the right
ones.  The filler is the installed Python standard library, so no download is needed.
"""

import random
import sysconfig
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["all", "train", "held-out"]

KEYS: tuple[str, ...] = (
    "albatross", "alpaca", "antelope", "armadillo", "baboon", "badger", "beaver", "bison", "bobcat", "buffalo",
    "caribou", "cheetah", "cobra", "condor", "cormorant", "cougar", "coyote", "crocodile", "dingo", "dolphin",
    "falcon", "ferret", "flamingo", "gazelle", "gecko", "gibbon", "giraffe", "gopher", "gorilla", "hamster",
    "hedgehog", "heron", "hyena", "ibex", "iguana", "jackal", "jaguar", "kangaroo", "koala", "lemur", "leopard",
    "lobster", "lynx", "macaw", "magpie", "mallard", "marmot", "meerkat", "mongoose", "narwhal", "ocelot", "octopus",
    "osprey", "ostrich", "otter", "panther", "pelican", "penguin", "platypus", "porcupine", "puffin", "raccoon",
    "walrus", "wombat",
)  # fmt: skip
"""Words that name a fact; each is one token of the recall model."""

VALUES: tuple[str, ...] = (
    "agate", "alabaster", "amber", "amethyst", "apricot", "aquamarine", "azure", "basalt", "beige", "beryl",
    "burgundy", "carmine", "cerulean", "chalk", "charcoal", "citrine", "cobalt", "copper", "coral", "crimson",
    "ebony", "emerald", "feldspar", "flint", "fuchsia", "garnet", "graphite", "gypsum", "indigo", "ivory", "jade",
    "jasper", "khaki", "lapis", "lavender", "lilac", "magenta", "malachite", "marble", "maroon", "mauve", "mica",
    "moonstone", "obsidian", "ochre", "onyx", "opal", "pearl", "peridot", "pewter", "platinum", "porphyry", "pumice",
    "pyrite", "quartz", "russet", "saffron", "sapphire", "sepia", "taupe", "topaz", "turquoise", "vermilion",
    "zircon",
)  # fmt: skip
"""Words that answer a question; each is one token of the recall model."""

_SKIPPED_DIRS = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})


@dataclass(frozen=True)
class Fact:
    """A value that can be asked for by its key."""

    key: str
    value: str

    @property
    def line(self) -> str:
        """The line that states the fact."""
        return f"remember {self.key} = {self.value}"

    @property
    def answer(self) -> str:
        """The text that a correct model writes right after ``question(self.key)``."""
        return f" {self.value}"


def question(key: str) -> str:
    """Returns the text, for a line of its own, whose next token is the value of ``key``."""
    return f"recall {key} ="


def make_facts(count: int, seed: int = 0) -> list[Fact]:
    """Returns ``count`` facts (at most 64) in which no key and no value occurs twice."""
    rng = random.Random(seed)
    pairs = zip(rng.sample(KEYS, count), rng.sample(VALUES, count), strict=True)
    return [Fact(key, value) for key, value in pairs]


def library_files(part: Part = "all") -> Iterator[tuple[Path, str]]:
    """Iterates over paths and texts of standard library sources, in a fixed order.

    A file's part depends on its name alone, so the files that the recall model was
    trained on stay apart from the others under any version of Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda found: found.relative_to(root).as_posix()):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata")  # describes the machine, not Python
        if generated or not _SKIPPED_DIRS.isdisjoint(name.parts):
            continue
        held_out = zlib.crc32(name.as_posix().encode()) % 4 == 0
        if part != "all" and held_out != (part == "held-out"):
            continue
        try:
            yield path, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def real_text(max_chars: int, part: Part = "held-out") -> str:
    """Returns at most ``max_chars`` of library source; by default from files that were not trained on."""
    pieces: list[str] = []
    left = max_chars
    for _, text in library_files(part):
        if left <= 0:
            break
        pieces.append(text[:left])
        left -= len(pieces[-1])
    return "".join(pieces)


def hide(text: str, facts: Sequence[Fact], places: Sequence[float] | None = None, seed: int = 0) -> str:
    """Returns ``text`` with each fact inserted as a line of its own, ending in a newline.

    ``places`` has a number from 0 (start) to 1 (end) for each fact, which is inserted at
    the next line start; by default the places are drawn at random from ``seed``.
    """
    rng = random.Random(seed)
    chosen = [rng.random() for _ in facts] if places is None else places
    lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    hidden: list[list[str]] = [[] for _ in starts]
    for fact, place in zip(facts, chosen, strict=True):
        hidden[bisect_left(starts, place * starts[-1])].append(fact.line + "\n")
    return "".join("".join(group) + line for group, line in zip(hidden, [*lines, ""], strict=True))
