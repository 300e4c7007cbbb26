"""A batch of prompts: each row is restored as if it were alone, then the suffixes of all rows run together.

A row is restored on its own canonical schedule, from its own first token, in its own place in the batch's buffers:

    column     0         pad                 start               end
    row 0      |         | chunk 0 | chunk 1 | chunk | suffix    |
    row 1      | zeros                | chunk 0     *| suffix    |

All rows end at the same column, so their suffixes start at different ones. The forward of the suffixes starts at the first of
these columns (`start`). If a row's chunks extend beyond it (*), the forward runs these tokens once more, as it runs padding,
but the result is not kept: the row's chunks stay as they are, and its suffix attends to them. So a row's KV is the same as for
the row alone, and the shape of the forward depends only on the lengths of the prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from cake_hf.blocks import blocks
from cake_hf.keys import chunk_keys
from cake_hf.layers import HEADROOM_TOKENS, TokenMajorLayer
from cake_hf.model.kv_layout import kv_template
from cake_hf.report import Report, Span
from cake_hf.restore.forwards import lossy_tokens, wait_for_devices
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.session import Session


class RestoreRow(Protocol):
    """Restores one prompt into layers that may already hold its first chunks, whose keys are `known`."""

    def __call__(
        self,
        layers: list[TokenMajorLayer],
        known: list[str],
        ids: torch.Tensor,
        *,
        namespace: str,
        report: Report,
        started: float,
    ) -> None: ...


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        number: in the batch.
        pad: columns of padding before its first token.
        chunks: how many full chunks are restored.
        keys: the keys of these chunks.
    """

    number: int
    pad: int
    chunks: int
    keys: list[str]


class BatchRestore:
    """The counterpart of `Restore` for a batch. Use: `run`; the suffixes, with `keep` in each layer; `close`, or `abandon`.

    Args:
        layers: the layers of the cache, without content.
        call: the forward that brought the batch; some of its rows have a chunk to be restored.
        started: when the call came.

    Attributes:
        report: the report of all rows together.
        start: the column at which the forward of the suffixes starts.
    """

    def __init__(
        self, session: Session, layers: list[TokenMajorLayer], call: ForwardCall, namespace: str, started: float
    ) -> None:
        self._session = session
        self._layers = layers
        self._call = call
        self._started = self._tail_begin = started
        lengths = call.lengths
        self.report = Report(tokens=sum(lengths), chunk_size=session.chunk_size, batch=len(lengths))
        self._namespace = namespace
        self._rows = [self._row(number, length) for number, length in enumerate(lengths)]
        self.start = min(self._end_of(row) for row in self._rows)

    def run(self, restore_row: RestoreRow) -> None:
        """Brings the full chunks of all rows into the layers; chunks that rows have in common at their start, only once."""
        try:
            self._run(restore_row)
        except BaseException:
            self.abandon()
            raise

    @property
    def found_some(self) -> bool:
        """Whether the store has some of the rows' chunks."""
        return self.report.chunks_missed < sum(row.chunks for row in self._rows) - self.report.chunks_shared

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the states `[batch, heads, new, head_dim]` of the suffixes, with the states of restored tokens put back."""
        beyond = [(row.number, self._end_of(row)) for row in self._rows if self._end_of(row) > self.start]
        if not beyond:
            return keys, values
        states = keys.clone(), values.clone()
        for new, buffer in zip(states, self._layers[layer].buffers, strict=True):
            for number, end in beyond:
                new[number, :, : end - self.start] = buffer[number, self.start : end].transpose(0, 1)
        return states

    def close(self) -> None:
        """Ends the restore after the suffixes have run."""
        wait_for_devices({buffer.device for layer in self._layers for buffer in layer.buffers})
        now = time.monotonic()
        self.report.timeline.append(
            Span("compute", -1, self._tail_begin - self._started, now - self._started, "computed")
        )
        self.report.prefill_seconds = now - self._started

    def abandon(self) -> None:
        """Empties the layers, as they were before, after a failure."""
        for layer in self._layers:
            layer.reset()

    def _run(self, restore_row: RestoreRow) -> None:
        for layer, template in zip(self._layers, kv_template(self._session.model), strict=True):
            keys, values = (states.expand(len(self._rows), -1, -1, -1) for states in (template.keys, template.values))
            layer.reserve(keys, values, self._call.tokens + HEADROOM_TOKENS)
        homes: dict[str, Row] = {}  # by the key of a chunk, the first row that has it
        for row in self._rows:
            self._restore(row, homes, restore_row)
            homes = {**dict.fromkeys(row.keys, row), **homes}
        for layer in self._layers:
            layer.show(self.start)
        self._tail_begin = time.monotonic()

    def _row(self, number: int, length: int) -> Row:
        size, tokens = self._session.chunk_size, self._call.tokens
        chunks = max(0, length - self._call.wanted_logits) // size
        prefix = self._call.ids[number, tokens - length : tokens - length + chunks * size]
        return Row(number, tokens - length, chunks, chunk_keys(self._namespace, prefix.tolist(), size))

    def _end_of(self, row: Row) -> int:
        """Returns the column at which the row's suffix starts."""
        return row.pad + row.chunks * self._session.chunk_size

    def _restore(self, row: Row, homes: dict[str, Row], restore_row: RestoreRow) -> None:
        session, size = self._session, self._session.chunk_size
        common = sum(key in homes for key in row.keys)  # keys are chained, so common chunks come first
        places = [layer.row(row.number, row.pad) for layer in self._layers]
        if common:
            home = homes[row.keys[common - 1]]
            for layer, place in zip(self._layers, places, strict=True):
                layer.copy_row(home.number, home.pad, place, common * size)
            self.report.chunks_shared += common
            if session.bound_store.lossy is not None:
                chunks = blocks(0, common * size, (), size)
                self.report.tokens_lossy += lossy_tokens(chunks, session.bound_model.layout(), 0)
        if common < row.chunks:
            ids = self._call.ids[row.number : row.number + 1, row.pad : self._end_of(row)]
            restore_row(
                places,
                row.keys[:common],
                ids,
                namespace=self._namespace,
                report=self.report,
                started=self._started,
            )
        for layer, place in zip(self._layers, places, strict=True):
            layer.take_row(row.number, row.pad, place)
