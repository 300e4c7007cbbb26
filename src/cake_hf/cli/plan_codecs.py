"""The codecs in `cake-hf plan`: what each takes, and which one is planned with."""

from __future__ import annotations

from dataclasses import dataclass

from cake_hf.cli.sheets import Bar
from cake_hf.scheduling.costs import RAW, TYPICAL, CodecCost, ComputeCost, Costs, LoadCost, encoding_pays
from cake_hf.scheduling.planner import plan
from cake_hf.util.sizes import bytes_text

NONE, AUTO, LOSSLESS, NEAR = "none", "auto", "lossless", "near"
BFLOAT16 = "BF16"
"""As safetensors names the only dtype that is encoded."""


@dataclass(frozen=True)
class Forms:
    """The forms in which chunks may be stored.

    Attributes:
        raw: what loading raw chunks costs.
        codecs: by name, raw chunks first.
        measured: the name of the codec whose numbers are measured ones; empty if all are typical ones.
        stored: the form in which chunks came last.
    """

    raw: LoadCost
    codecs: dict[str, CodecCost]
    measured: str
    stored: str

    def load(self, name: str) -> LoadCost:
        """Returns what loading costs in that form."""
        return self.raw if name == NONE else self.codecs[name].load(self.raw)

    def choose(self, wanted: str) -> str:
        """Returns the name of the form to plan with.

        Args:
            wanted: a name, "auto" for what pays, or empty for the form in which chunks came last.

        Raises:
            ValueError: there is none of that name.
        """
        if not wanted:
            return self.stored
        if wanted == AUTO:
            encodes = LOSSLESS in self.codecs and encoding_pays(Costs(None, self.raw, self.codecs[LOSSLESS]))
            return LOSSLESS if encodes else NONE
        if wanted not in self.codecs:
            raise ValueError(f"codec {wanted!r} is unknown; choose one of {', '.join([*self.codecs, AUTO])}.")
        return wanted

    def text(self, name: str) -> str:
        """Returns what a codec takes, in words."""
        if name == NONE:
            return "none: chunks are stored as they are"
        codec, source = self.codecs[name], "measured" if name == self.measured else "typical"
        return f"{name}: {codec.ratio:.2f} of the bytes, {codec.speed / 1e9:.3g} GB/s per thread ({source})"

    def bars(self, compute: ComputeCost, chunks: int, suffix: float, chosen: str) -> list[Bar]:
        """Returns the predicted seconds to the first token in each form, with both ends at work.

        Args:
            compute: what computing costs.
            chunks: of the prompt, all of them stored.
            suffix: seconds of the prompt's suffix.
            chosen: the form that is planned with.
        """
        return [
            Bar(
                name,
                self._seconds(name, compute, chunks, suffix),
                "green" if name == chosen else "dim",
                bytes_text(self.load(name).chunk_bytes),
            )
            for name in self.codecs
        ]

    def in_time(self, compute: ComputeCost, chunks: int, suffix: float, max_ttft: float) -> tuple[str, bool]:
        """Returns the finest form that a cache with that `max_ttft` would load throughout, and whether it is in time."""
        for name in (LOSSLESS, NEAR):
            if name in self.codecs and self._seconds(name, compute, chunks, suffix) <= max_ttft:
                return name, True
        last = NEAR if NEAR in self.codecs else NONE
        return last, self._seconds(last, compute, chunks, suffix) <= max_ttft

    def _seconds(self, name: str, compute: ComputeCost, chunks: int, suffix: float) -> float:
        made = plan(Costs(compute, self.load(name)), [True] * chunks, suffix_seconds=suffix)
        return made.predicted_seconds or 0.0


def forms_of(raw: LoadCost, codec: CodecCost | None, dtype: str, *, came_encoded: bool) -> Forms:
    """Returns the forms in which chunks may be stored.

    Args:
        raw: what loading raw chunks costs.
        codec: as measured; None for typical numbers.
        dtype: the dtype of the KV, as safetensors names it; empty if it is not known. Other KV than bfloat16 is not encoded.
        came_encoded: whether chunks were encoded when they were last loaded.
    """
    if dtype not in ("", BFLOAT16):
        return Forms(raw, {NONE: RAW}, "", NONE)
    codecs = {NONE: RAW, **TYPICAL, **({LOSSLESS: codec} if codec else {})}
    return Forms(raw, codecs, LOSSLESS if codec else "", LOSSLESS if came_encoded else NONE)
