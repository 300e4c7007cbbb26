"""What a side is asked and what it is told when it starts; shared by the process that asks and the one that answers."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

DISK, MEMORY = "disk", "memory"
"""What a process of a system is for: each question served from the store alone, or from what the process holds."""

BLOCK = 128
"""Tokens of a chunk of ours and of kvboost's, and of a block of vLLM's on a CPU."""


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        ids: its tokens.
        document: how many of them, from the first, are the document.
        text: the same as text, for systems that only take that.
        new: tokens to generate, greedily.
        reuse: False for the system's own run without a cache.
    """

    ids: list[int]
    document: int
    text: str
    new: int
    reuse: bool = True

    @property
    def name(self) -> str:
        """A file name for the document's KV, for systems whose user chooses one: a digest of the tokens."""
        return hashlib.sha256(repr(self.ids[: self.document]).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """The answer.

    Attributes:
        tokens: the new ones.
        seconds: from the question to the first token.
        loaded: tokens of the prompt whose KV was not computed; None if the system does not say.
    """

    tokens: list[int]
    seconds: float
    loaded: int | None = None


class System(Protocol):
    """A system in its process."""

    def ask(self, question: Question) -> Answer:
        """Answers; raises what its user would see."""
        ...

    def close(self) -> None:
        """Ends as a user would end it, with everything saved."""
        ...


@dataclass(frozen=True)
class Options:
    """What a side is told when it starts.

    Attributes:
        module: of the system.
        model: folder of the weights.
        dtype: of the weights.
        store: directory for its KV.
        role: DISK or MEMORY.
        threads: that compute.
        room: the most tokens of prompt and answer.
        adapter: folder of a LoRA adapter, or "".
        tenant: the tenant who asks, or "".
        extra: more, which only this module knows.
    """

    module: str
    model: str
    dtype: str
    store: str
    role: str
    threads: int
    room: int
    adapter: str = ""
    tenant: str = ""
    extra: list[str] = field(default_factory=list)

    def arguments(self) -> list[str]:
        """Returns them for a command line."""
        named = [f"--{name}={value}" for name, value in asdict(self).items() if name != "extra"]
        return [*named, *(f"--extra={one}" for one in self.extra)]

    @property
    def folder(self) -> Path:
        """The store's directory."""
        return Path(self.store)


def parse(arguments: list[str]) -> Options:
    """Returns the options that `Options.arguments` made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shootout.side")
    for name in ("module", "model", "dtype", "store", "role", "adapter", "tenant"):
        parser.add_argument(f"--{name}", default="")
    for name in ("threads", "room"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--extra", action="append", default=[])
    return Options(**vars(parser.parse_args(arguments)))
