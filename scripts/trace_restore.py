"""Trace one warm `generate`: how much code of the package a restore runs through, and how often that changes files.

    python scripts/trace_restore.py [--calls] [--tokens N]

The model is a small random Llama. The prompt has 8 chunks, all of them stored, and a last piece; the cache exists already. Only
the main thread is counted. A *crossing* is a call of a function in one file of the package by one in another file. Calls
through other libraries count as direct ones, and a generator that is resumed counts as called.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

CHUNK = 16
CHUNKS = 8
LAST_PIECE = 7
OUTSIDE = "outside"


@dataclass
class Trace:
    """Counts of the calls in one run.

    Attributes:
        functions: calls of each function.
        crossings: calls from file to file, by (file of the caller, file of the called function).
        borders: the same, with the name of the called function.
    """

    root: str
    functions: Counter[CodeType] = field(default_factory=Counter)
    crossings: Counter[tuple[str, str]] = field(default_factory=Counter)
    borders: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _files: list[str] = field(default_factory=lambda: [OUTSIDE])

    @property
    def files(self) -> set[str]:
        """The package's files of which some code ran."""
        return {self._short(code.co_filename) for code in self.functions}

    @property
    def total(self) -> int:
        """The number of crossings from file to file; calls from outside the package do not count."""
        return sum(count for (caller, _), count in self.crossings.items() if caller != OUTSIDE)

    def saw(self, frame: FrameType, event: str, argument: object) -> None:
        """Counts one event. It is the callback for `sys.setprofile`."""
        code = frame.f_code
        if not code.co_filename.startswith(self.root):
            return
        if event == "call":
            file, caller = self._short(code.co_filename), self._files[-1]
            self.functions[code] += 1
            self._files.append(file)
            if file != caller:
                self.crossings[caller, file] += 1
                self.borders[caller, file, code.co_qualname] += 1
        elif event == "return":
            self._files.pop()

    def _short(self, file: str) -> str:
        return str(Path(file).relative_to(self.root))


def traced(run: Callable[[], object]) -> Trace:
    """Run something, and count which code of the package runs in this thread meanwhile."""
    import cake_hf

    trace = Trace(str(Path(cake_hf.__path__[0])))
    sys.setprofile(trace.saw)
    try:
        run()
    finally:
        sys.setprofile(None)
    return trace


def warm_restore(new_tokens: int = 1) -> Trace:
    """Trace one `generate` whose prompt is stored, the third one of its kind in this process.

    Raises:
        RuntimeError: the prompt was not restored.
    """
    import torch

    from cake_hf import CakeCache, MemoryStore
    from cake_hf.layers.compat import for_generate

    model, store = _small_llama(), MemoryStore()
    ids = torch.arange(CHUNKS * CHUNK + LAST_PIECE).unsqueeze(0) * 7 % 61 + 3

    def generate(cache: CakeCache) -> Any:
        return model.generate(ids, **for_generate(model, cache), max_new_tokens=new_tokens, do_sample=False)

    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            generate(cache)
            cache.flush()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        trace = traced(lambda: generate(cache))
        if cache.report.chunks_loaded != CHUNKS:
            raise RuntimeError(f"{cache.report.chunks_loaded} of {CHUNKS} chunks were loaded: {cache.report.reason}.")
    return trace


def _small_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", action="store_true", help="list the crossings by pair of files, and by function")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens to generate (1: the restore alone)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    trace = warm_restore(options.tokens)
    print(f"{len(trace.files)} files, {len(trace.functions)} functions, {trace.total} border crossings")
    if options.calls:
        for (caller, called), count in trace.crossings.most_common():
            names = Counter(
                {name: n for (one, other, name), n in trace.borders.items() if (one, other) == (caller, called)}
            )
            told = ", ".join(f"{name} {n}" for name, n in names.most_common(6))
            print(f"{count:5}  {caller} -> {called}: {told}{', ...' if len(names) > 6 else ''}")


if __name__ == "__main__":
    main()
