"""What the paper reports (Jin et al., ICML 2025, arXiv 2410.03065), beside which our cells are shown. ~: read off a plot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published cell.

    Attributes:
        where: model, GPUs, and what else says which cell it is.
        tokens, gbps: of the prompt and of the line.
        over_load, over_compute: times as fast as each single method; None where the paper does not say.
        ours: whether our grid has this model's shape.
    """

    where: str
    tokens: int
    gbps: int
    over_load: float | None
    over_compute: float | None
    ours: bool = False


CELLS = (
    Published("Llama-3.1-8B, 2 A100", 16384, 32, 1.37, 3.18, ours=True),
    Published("LongAlpaca-7B, A100", 16384, 32, 2.20, 1.94),
    Published("LongAlpaca-13B, A100", 16384, 32, 2.00, 1.91),
    Published("LongAlpaca-13B, H100", 16384, 32, 2.40, 1.75),
    Published("LongAlpaca-13B, 2 A100", 16384, 32, 2.63, 1.59),
    Published("LongAlpaca-13B, 2 A100", 4096, 32, 2.67, 1.25),
    Published("LongAlpaca-13B, slower than computing alone", 4096, 7, None, 0.99),
    Published("Llama-3.1-8B with 12.5 % of the GPU, slower than loading alone", 16384, 32, 0.98, None),
    Published("Llama-3.1-70B with 12.5 % of the GPU, slower than loading alone", 16384, 32, 0.80, None),
)

AVERAGE = 2.6
"""Times as fast, over all of the paper's cells."""
ETA = "0.91 to 0.97 at 16K tokens, 0.84 at 4K (computed from its tables)"
