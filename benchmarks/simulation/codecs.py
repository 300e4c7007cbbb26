"""`python -m benchmarks simulate --codecs`: restores of encoded chunks on a virtual clock.

Four tables: the paper's KV of 16, 8 and 3 bits beside what it reports; each codec over bandwidths; decoding on the cores that
compute; and loads that choose a form to keep a time while the line drops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.simulation.simulator import Outcome, Setting, best_seconds, simulate, steps
from benchmarks.simulation.speeds import step
from cake_hf.cli.sheets import Sheet
from cake_hf.scheduling.costs import RAW, TYPICAL, CodecCost, Costs, encoding_pays
from cake_hf.util.sizes import seconds_text

GIGA, BITS_PER_BYTE, KIB = 1e9, 8, 2**10

FORMS = {"none": RAW, **{name: TYPICAL[name] for name in ("lossless", "near", "int4")}}
"""From the finest to the coarsest."""

CHUNK = 512
EIGHT_BYTES = CHUNK * 128 * KIB
EIGHT_STEPS = steps(16 * KIB // CHUNK, 0.0274, (0.0935 - 0.0274) / 63)
"""8B at 16K tokens: 128 KiB of KV per token, and the step times of 7B on an H100 in the paper; 1.40 s to compute all."""

BANDWIDTHS = (1, 3, 7, 16, 32, 64, 100, 200, 400)
"""10^9 bits per second."""

RATIOS = (0.5, 1.0, 2.0)
"""Seconds to load all raw chunks over seconds to compute all."""

DECODING = (0.0, 0.01, 0.1, 0.5)
"""Seconds of all cores to decode a chunk, over seconds to compute one."""

CORES = 2
DROPS = (1.0, 0.5, 0.25, 0.1)
"""What is left of the bandwidth from DROP_AT on."""

DROP_AT, DROPPING_GBPS, TARGET = 0.15, 16.0, 0.7

LEGEND = (
    "Seconds to the first token, by the library's own decisions with known costs. auto: the form that pays with so many "
    "loaders. Sizes and decode speeds are the library's typical ones. Bound: r(Tc + Tl) / (Tc + r*Tl). Line that drops: "
    f"{DROPPING_GBPS:g} Gbps, of which a part is left after {DROP_AT:g} s; target {TARGET:g} s, ! missed; shares of the "
    "chunks by form; max_ttft: at each claim the finest form that is in time, and if there is none the coarsest."
)


@dataclass(frozen=True)
class Row:
    """A row of a table, for people and for programs."""

    cells: list[str]
    plain: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table and its name in the JSON."""

    name: str
    title: str
    headings: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)

    @property
    def sheet(self) -> Sheet:
        """The table for people."""
        return Sheet(self.title, self.headings, [row.cells for row in self.rows])


def tables(threads: int = 2) -> Iterator[Table]:
    """Returns all tables but the paper's, one after the other."""
    yield over_bandwidths(threads)
    yield on_shared_cores(threads)
    yield while_the_line_drops(threads)


def eight(gbps: float, threads: int, codec: CodecCost | None = None) -> Setting:
    """Returns 8B at 16K tokens with chunks of that form behind a line."""
    bandwidth = gbps * GIGA / BITS_PER_BYTE
    return Setting(EIGHT_STEPS, EIGHT_BYTES, bandwidth, threads=threads, codec=None if codec is RAW else codec)


def over_bandwidths(threads: int) -> Table:
    """Returns the seconds of each codec at each bandwidth."""
    rows = []
    for gbps in BANDWIDTHS:
        taken = {name: simulate(eight(gbps, threads, codec), "both").seconds for name, codec in FORMS.items()}
        least = {name: best_seconds(eight(gbps, threads, codec)) for name, codec in FORMS.items()}
        raw = eight(gbps, threads).line
        auto = "lossless" if encoding_pays(Costs(None, raw, FORMS["lossless"])) else "none"
        cells = [f"{gbps:g}", *(seconds_text(taken[name]) for name in FORMS), auto]
        rows.append(Row(cells, {"gbps": gbps, "seconds": taken, "best": least, "auto": auto}))
    title = "8B, 16K tokens, H100: seconds to the first token"
    return Table("bandwidths", title, ("<Gbps", *FORMS, "auto"), rows)


def on_shared_cores(threads: int) -> Table:
    """Returns lossless over raw where decoding takes from computing."""
    rows = []
    for share in DECODING:
        times = {}
        for ratio in RATIOS:
            raw = Setting(EIGHT_STEPS, EIGHT_BYTES, len(EIGHT_STEPS) * EIGHT_BYTES / (ratio * sum(EIGHT_STEPS)))
            raw = replace(raw, threads=threads, cores=CORES)
            usual = sum(EIGHT_STEPS) / len(EIGHT_STEPS)
            speed = EIGHT_BYTES / (share * usual * CORES) if share else RAW.speed
            encoded = replace(raw, codec=CodecCost(FORMS["lossless"].ratio, speed))
            times[ratio] = simulate(encoded, "both").seconds / simulate(raw, "both").seconds
        cells = [f"{share:g}", *(f"{times[ratio]:.2f}" for ratio in RATIOS)]
        rows.append(Row(cells, {"decoding_over_computing": share, "lossless_over_raw": times}))
    bound = [gain(FORMS["lossless"].ratio, ratio) for ratio in RATIOS]
    rows.append(Row(["bound", *(f"{one:.2f}" for one in bound)], {"bound": dict(zip(RATIOS, bound, strict=True))}))
    title = f"Decoding on the {CORES} cores that compute: lossless over raw, by loading over computing"
    return Table("cores", title, ("<decode/compute", *(f"{ratio:g}" for ratio in RATIOS)), rows)


def gain(ratio: float, load: float, compute: float = 1.0) -> float:
    """Returns `r(Tc + Tl) / (Tc + r*Tl)`: encoded over raw where both ends work, computing costs the same for all chunks, and
    decoding costs nothing.

    Args:
        ratio: r, of an encoded chunk to a raw one.
        load: Tl, seconds to load all raw chunks.
        compute: Tc, seconds to compute all.
    """
    return ratio * (compute + load) / (compute + ratio * load)


def while_the_line_drops(threads: int) -> Table:
    """Returns each form alone, and the choice among them, at each drop."""
    rows = []
    for left in DROPS:
        where = replace(eight(DROPPING_GBPS, threads), line_speed=step(DROP_AT, left))
        for name, codec in FORMS.items():
            outcome = simulate(replace(where, codec=None if codec is RAW else codec), "both")
            rows.append(_drop_row(left, name, outcome, {name: outcome.loaded}))
        outcome = simulate(replace(where, forms=tuple(FORMS.values()), max_ttft=TARGET), "both")
        chosen = [list(FORMS)[form] for form in outcome.forms]
        rows.append(_drop_row(left, "max_ttft", outcome, {name: chosen.count(name) for name in FORMS}))
    headings = ("<left", "<loads", "TTFT", *FORMS, "computed")
    return Table("drops", "8B, 16K tokens, H100: a line that drops", headings, rows)


def _drop_row(left: float, policy: str, outcome: Outcome, loaded: dict[str, int]) -> Row:
    chunks = outcome.computed + outcome.loaded
    shares = {name: loaded.get(name, 0) / chunks for name in FORMS}
    met = outcome.seconds <= TARGET
    cells = [f"{left:g}", policy, f"{seconds_text(outcome.seconds)}{'' if met else '!'}"]
    cells += [f"{share:.0%}" if share else "-" for share in (*shares.values(), outcome.computed / chunks)]
    told = {"left": left, "loads": policy, "seconds": outcome.seconds, "met": met, "shares": shares}
    return Row(cells, {**told, "computed": outcome.computed / chunks})
