"""What a stage finds in its process: sizes, folders, the time that is left, and the large model's bench."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.figures import Result
from benchmarks.gpu_check.outcome import Plain
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.models import build_model, build_prompt
from benchmarks.workbench import Parity, Workbench
from cake_hf.keys import chunk_keys
from cake_hf.stores.local import LocalStore


class NotHere(Exception):
    """What would be measured is not in this version; the text says what is missing."""


@dataclass
class Desk:
    """One stage's.

    Attributes:
        sizes: of the check.
        until: when the process is ended, in seconds since the epoch.
        folder: for what the stage makes.
        shared: for what later stages use, too.
        keep: called with all that the stage has come to so far; what was kept is not lost if its time ends.
    """

    sizes: Sizes
    until: float
    folder: Path
    shared: Path
    keep: Callable[[Plain], None]
    now: Callable[[], float] = time.time

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.until - self.now()

    def bench(self, tokens: int, **changes: Any) -> Workbench:
        """A bench of the large model for a prompt of that length; its store has all chunks of the longest one.

        Args:
            tokens: of the prefix.
            **changes: of its settings; of none that chunks depend on.
        """
        settings = self.sizes.settings()
        longest = Workbench(settings, build_model(settings), build_prompt(settings), self.folder)
        longest._filled = self._filled(longest)
        settings = replace(settings, **{"tokens": tokens, **changes})
        ids = longest.ids[:, : tokens + settings.suffix_tokens]
        seen = longest.parity  # while the store was filled
        bench = replace(longest, settings=settings, ids=ids, parity=Parity(seen.checks, list(seen.mismatches)))
        bench.plain_run("warm-up")
        return bench

    def saving_bench(self) -> Workbench:
        """A bench for a prompt of the middle length; its queue has room for all chunks, so that none stays unsaved."""
        bench = self.bench(self.sizes.middle)
        limits = bench.settings.limits
        room = bench.settings.chunks * bench.chunk_bytes()
        roomy = replace(limits, save_queue_bytes=max(limits.save_queue_bytes, room))
        return replace(bench, settings=replace(bench.settings, limits=roomy))

    def _filled(self, longest: Workbench) -> LocalStore:
        """The store that an earlier stage has filled, or one that is filled now."""
        root = self.shared / "filled"
        store = LocalStore(root, budget=None)
        if root.exists() and all(store.contains(_keys(longest, store))):
            return store
        shutil.rmtree(root, ignore_errors=True)  # of a stage whose time ended meanwhile
        made = replace(longest, folder=self.shared, _filled=None)
        return made.filled_store()


def _keys(bench: Workbench, store: LocalStore) -> list[str]:
    with closing(bench.session(store)) as session:
        ids = bench.ids[0, : bench.settings.tokens].tolist()
        return list(chunk_keys(session.bound_model.namespace(), ids, bench.settings.chunk_size))


def plain(result: Result, bench: Workbench) -> Plain:
    """A measurement as JSON has it, with the watch on exactness that went along."""
    return {"title": result.title, **result.as_dict(), "parity": bench.parity.as_dict(), "failure": result.failure}
