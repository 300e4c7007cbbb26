"""What happened to one prompt, as plain data that prints itself."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, fields
from typing import Any

from cake_hf.util.redaction import shown

LANE_WIDTH = 60

_FILLS = {
    **dict.fromkeys(("computed", "gated", "loaded", "shared", "refined"), "="),
    **dict.fromkeys(("preempted", "superseded"), "~"),
}


@dataclass(frozen=True)
class Refusal:
    """Why a prompt, or a part of it, is not restored: returned by the code that decides it, and put on the report by `explain`.

    Attributes:
        code: a stable name for the reason, listed in docs/troubleshooting.md.
        text: a clause for people, without a full stop.
    """

    code: str
    text: str


@dataclass(frozen=True)
class Span:
    """One actor's work on one chunk.

    Attributes:
        actor: "compute" for the main thread, "load-0", "load-1", ... for loader threads; "refine" for refinements.
        chunk: index on the absolute grid; -1 for the last partial chunk ("tail").
        start, end: seconds since the start of the restore.
        outcome: "computed", "loaded", "missed", "corrupt", "error" or "late"; "preempted" if a forward ended early because its
            chunk had arrived from the store; "gated" if the forward waited, layer by layer, for loads that were still under
            way; "shared" if the chunk came from another prompt that was being restored at the same time; "superseded" if a load
            was no longer needed when it arrived; "refined" if the rest of a chunk came that was loaded in part at first.
    """

    actor: str
    chunk: int
    start: float
    end: float
    outcome: str


class RedactedText:
    """A field of text, empty by default, that passes through `shown`: it quotes stores and models, which may say anything."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, report: Any, owner: type | None = None) -> str:
        return "" if report is None else str(report.__dict__[self._name])

    def __set__(self, report: Any, value: object) -> None:
        report.__dict__[self._name] = shown(value) if value else ""


@dataclass
class Report:
    """Counts, bytes, seconds and the timeline of the last prompt of a cache.

    `chunks_computed + chunks_loaded + chunks_shared` is the number of full chunks before the prompt's suffix, which is always
    computed. `chunks_missed` and `chunks_failed` say why chunks were computed: not in the store, or in it but unusable.

    Attributes:
        tokens: length of the prompt; for a batch, of all rows together, without padding.
        chunk_size: tokens per chunk.
        batch: number of prompts; all other fields are totals over all of them.
        chunks_computed, chunks_loaded, chunks_missed, chunks_failed: chunks of the restored prefix.
        chunks_shared: chunks of the prefix that were copied from another prompt that was being restored at the same time, or
            from another row of the batch.
        tails_computed, tails_loaded, tails_saved: blocks between full chunks and declared cuts (see `CakeCache.prefill`), and
            decoded tokens of earlier turns.
        tail_tokens_loaded: tokens of the loaded tails.
        chunks_saved: new chunks that are durable in the store; grows until `cache.flush()` returns.
        chunks_unsaved: new chunks and tails that were not saved because the queue was full or the store refused them.
        tokens_lossy: tokens whose KV has gone through a lossy codec, loaded or computed; all others are exact.
        tokens_hurried: those of them that were loaded in the form of the codec "near", because all of their KV would have come
            after `max_ttft`. What was computed behind them is not exact, either.
        states_loaded, states_saved: snapshots of a model's recurrent state, which are stored beside chunks.
        bytes_loaded, bytes_saved: payload bytes of chunks and states.
        store: the store's name without secrets; for a directory, the last part of its path; empty if the store was not asked.
        bytes_stored: bytes that this prompt's chunks and states take in the store, headers included: those found when the
            prompt arrived, and those saved since. Those found and not read count as if they were not encoded.
        seconds_saved: the time that computing everything would have taken, by the costs measured so far, minus the time taken;
            None if nothing was loaded or shared, or if the cost of computing is not known yet. Negative if computing would have
            been faster.
        prefill_seconds: seconds from the call's arrival to the logits of the prompt's last token (the library's part of TTFT).
        timeline: which actor worked on which chunk, and when.
        reason: empty, or why the prompt, or a part of it, was not restored, in words.
        reason_code: a stable name for that reason, for programs: see docs/troubleshooting.md.
    """

    tokens: int = 0
    chunk_size: int = 0
    batch: int = 1
    chunks_computed: int = 0
    chunks_loaded: int = 0
    chunks_missed: int = 0
    chunks_failed: int = 0
    chunks_shared: int = 0
    tails_computed: int = 0
    tails_loaded: int = 0
    tail_tokens_loaded: int = 0
    tails_saved: int = 0
    chunks_saved: int = 0
    chunks_unsaved: int = 0
    tokens_lossy: int = 0
    tokens_hurried: int = 0
    states_loaded: int = 0
    states_saved: int = 0
    bytes_loaded: int = 0
    bytes_saved: int = 0
    store: str = RedactedText()  # type: ignore[assignment]  # a descriptor
    bytes_stored: int = 0
    seconds_saved: float | None = None
    prefill_seconds: float = 0.0
    timeline: list[Span] = field(default_factory=list, repr=False)
    reason: str = RedactedText()  # type: ignore[assignment]  # a descriptor
    reason_code: str = ""

    def explain(self, refusal: Refusal | None) -> None:
        """Sets `reason` and `reason_code`; None clears them."""
        self.reason, self.reason_code = ("", "") if refusal is None else (refusal.text, refusal.code)

    @property
    def restored(self) -> int:
        """Number of full chunks before the prompt's suffix that have been computed, loaded or shared so far."""
        return self.chunks_computed + self.chunks_loaded + self.chunks_shared

    def repeat(self, batch: int) -> None:
        """Extends the report to a batch of that many equal prompts: one was restored and then copied for the others."""
        self.chunks_shared += (batch - 1) * self.restored
        self.tokens *= batch
        self.tokens_lossy *= batch
        self.tokens_hurried *= batch
        self.batch = batch

    def rows(self) -> list[tuple[str, str]]:
        """Returns the label and value of each line of the table."""
        rows = [
            ("tokens", f"{self.tokens:,} in chunks of {self.chunk_size}{self._prompts()}"),
            ("chunks", f"{self.chunks_loaded} loaded, {self.chunks_computed} computed{self._shared()}"),
            ("not loaded", f"{self.chunks_missed} missed, {self.chunks_failed} failed"),
            ("saved", f"{self.chunks_saved} chunks, {_bytes(self.bytes_saved)}"),
            ("loaded", _bytes(self.bytes_loaded)),
            ("prefill", f"{self.prefill_seconds:.3f} s{self._saved_time()}"),
        ]
        if self.store:
            rows.append(("store", f"{self.store}: {_bytes(self.bytes_stored)} of this prompt"))
        if self.tails_loaded or self.tails_computed or self.tails_saved:
            done = f"{self.tails_loaded} loaded, {self.tails_computed} computed, {self.tails_saved} saved"
            rows.append(("tails", done))
        if self.states_loaded or self.states_saved:
            rows.append(("states", f"{self.states_loaded} loaded, {self.states_saved} saved"))
        if self.tokens_lossy:
            rows.append(("lossy", f"{self.tokens_lossy:,} tokens, whose KV is not exact{self._hurried()}"))
        if self.chunks_unsaved:
            rows.append(("not saved", f"{self.chunks_unsaved} chunks"))
        if self.reason:
            rows.append(("note", self.reason))
        return rows

    def _prompts(self) -> str:
        return f", {self.batch} prompts" if self.batch > 1 else ""

    def _shared(self) -> str:
        return f", {self.chunks_shared} shared" if self.chunks_shared else ""

    def _hurried(self) -> str:
        if not self.tokens_hurried:
            return ""
        return f": {self.tokens_hurried:,} came as near, since all of their KV would have come after max_ttft"

    def _saved_time(self) -> str:
        if self.seconds_saved is not None:
            less = "less" if self.seconds_saved >= 0 else "more"
            return f", {abs(self.seconds_saved):.3f} s {less} than computing all"
        brought = self.chunks_loaded + self.chunks_shared
        return "; what was saved is not known, since nothing was computed here before" * bool(brought)

    def lanes(self) -> dict[str, list[Span]]:
        """Returns the timeline by actor, the computing thread first."""
        actors = sorted({span.actor for span in self.timeline})
        return {actor: [span for span in self.timeline if span.actor == actor] for actor in actors}

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        table = [f"{label:<{width}}  {value}" for label, value in self.rows()]
        return "\n".join(["cake_hf report", *table, *self.text_lanes()])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
            for label, value in self.rows()
        )
        lanes = html.escape("\n".join(self.text_lanes()))
        return f"<table><caption>cake_hf report</caption>{rows}</table>{lanes and f'<pre>{lanes}</pre>'}"

    def as_dict(self) -> dict[str, object]:
        """Returns all fields as JSON-ready values, the timeline as lists."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "timeline"}
        spans = [[s.actor, s.chunk, round(s.start, 6), round(s.end, 6), s.outcome] for s in self.timeline]
        return {**plain, "timeline": spans}

    def text_lanes(self, width: int = LANE_WIDTH) -> list[str]:
        """Returns the timeline as text: a line per actor, in which each chunk has its number and a bar as long as it took.

        Args:
            width: characters that stand for the time from the restore's start to the end of the last span.
        """
        lanes = self.lanes()
        total = max((span.end for span in self.timeline), default=0.0)
        if not total:
            return []
        margin = max(len(actor) for actor in lanes)
        return [f"{actor:<{margin}} |{_text_lane(spans, total, width)}|" for actor, spans in lanes.items()]


def _text_lane(spans: list[Span], total: float, width: int) -> str:
    """Returns an actor's lane: each span is its chunk's number, then '=' ('~': preempted or superseded, '!': unusable)."""
    cells = [" "] * width
    for span in spans:
        start = min(int(span.start / total * width), width - 1)
        end = max(start + 1, round(span.end / total * width))
        fill = _FILLS.get(span.outcome, "!")
        label = "t" if span.chunk < 0 else str(span.chunk)
        cells[start:end] = list((label + fill * (end - start))[: end - start])
    return "".join(cells)


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
