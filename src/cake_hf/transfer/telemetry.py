"""Telemetry: one log line per kind of fault, and metrics through the OpenTelemetry API.

    cake_hf.chunks            counter, {chunk}   by cake_hf.outcome: loaded, computed, shared, missed, failed, saved, unsaved
    cake_hf.bytes             counter, By        by cake_hf.direction: loaded, saved
    cake_hf.prefill.duration  histogram, s       a prompt's arrival to the logits of its last token
    cake_hf.lookup.duration   histogram, s       asking the store which chunks it has

and of continuous batching

    cake_hf.ttft              histogram, s       a request's arrival to the first token of its answer
    cake_hf.requests          counter, {request} by cake_hf.outcome: restored, plain
    cake_hf.steps             counter, {step}    by cake_hf.kind: alone, yielded

Without an SDK that the program sets up, the API's instruments do nothing. No error in this module ever affects a prompt.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from cake_hf.report import Report
from cake_hf.util.forks import Lock
from cake_hf.util.interrupts import is_the_users

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter


from cake_hf.errors import CorruptChunk, NewerChunk
from cake_hf.scheduling.ledger import Outcome

logger = logging.getLogger("cake_hf")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Bucket bounds of the histograms. The SDK's defaults are for milliseconds: all our values would be in the first bucket."""


class Instruments:
    """The instruments, made by a meter."""

    def __init__(self, meter: Meter) -> None:
        self._chunks = meter.create_counter("cake_hf.chunks", "{chunk}", "Chunks of prompts, by what became of them.")
        self._bytes = meter.create_counter("cake_hf.bytes", "By", "KV that was loaded from and saved to stores.")
        self._requests = meter.create_counter("cake_hf.requests", "{request}", "Requests of continuous batching.")
        self._steps = meter.create_counter("cake_hf.steps", "{step}", "Steps that restores took, or left to others.")

        def seconds(name: str, description: str) -> Histogram:
            return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=SECONDS)

        self._prefill = seconds("cake_hf.prefill.duration", "From a prompt's arrival to the logits of its last token.")
        self._lookup = seconds("cake_hf.lookup.duration", "Asking a store which of a prompt's chunks it has.")
        self._ttft = seconds("cake_hf.ttft", "From a request's arrival to the first token of its answer.")

    def request(self, restored: bool, seconds: float) -> None:
        """See `observe_request`."""
        self._requests.add(1, {"cake_hf.outcome": "restored" if restored else "plain"})
        self._ttft.record(seconds)

    def step(self, kind: str) -> None:
        """See `observe_step`."""
        self._steps.add(1, {"cake_hf.kind": kind})

    def prompt(self, report: Report) -> None:
        """See `observe`."""
        outcomes = {
            "loaded": report.chunks_loaded,
            "computed": report.chunks_computed,
            "missed": report.chunks_missed,
            "failed": report.chunks_failed,
            "shared": report.chunks_shared,
        }
        for outcome, count in outcomes.items():
            if count:
                self._chunks.add(count, {"cake_hf.outcome": outcome})
        if report.bytes_loaded:
            self._bytes.add(report.bytes_loaded, {"cake_hf.direction": "loaded"})
        self._prefill.record(report.prefill_seconds)

    def lookup(self, seconds: float) -> None:
        """See `observe_lookup`."""
        self._lookup.record(seconds)

    def save(self, durable: bool, nbytes: int) -> None:
        """See `observe_save`."""
        self._chunks.add(1, {"cake_hf.outcome": "saved" if durable else "unsaved"})
        if durable:
            self._bytes.add(nbytes, {"cake_hf.direction": "saved"})


class _Watch:
    """The instruments of this process, made when they are first needed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._made = False
        self._instruments: Instruments | None = None

    def use(self, make_meter: Callable[[], Meter | None], *, again: bool) -> None:
        """Makes instruments with a meter (without one: none), for the first time or again."""
        with self._lock:
            if self._made and not again:
                return
            self._instruments = None
            try:
                meter = make_meter()
                self._instruments = Instruments(meter) if meter is not None else None
            except Exception as error:
                if is_the_users(error):
                    raise
                logger.warning("Nothing is reported to OpenTelemetry (1.30 or newer is needed). %s", error)
            self._made = True

    def tell(self, what: Callable[[Instruments], None]) -> None:
        """Records something, if there are instruments."""
        if not self._made:
            if not _may_have_provider():
                return
            self.use(_global_meter, again=False)
        instruments = self._instruments
        if instruments is None:
            return
        try:
            what(instruments)
        except Exception as error:
            if is_the_users(error):
                raise
            logger.debug("OpenTelemetry could not be told. %s", error)


_watch = _Watch()


def observe(report: Report) -> None:
    """Counts a finished prompt. Its saved chunks are counted later, by `observe_save`."""
    _watch.tell(lambda instruments: instruments.prompt(report))


def observe_request(report: Report) -> None:
    """Counts a request of continuous batching whose prompt is done: was anything of it loaded, or computed in chunks?"""
    _watch.tell(lambda instruments: instruments.request(bool(report.restored), report.prefill_seconds))


def observe_step(kind: str) -> None:
    """Counts a step of continuous batching.

    Args:
        kind: "alone" if one restore had it alone, "yielded" if a restore left it to other requests.
    """
    _watch.tell(lambda instruments: instruments.step(kind))


def observe_lookup(seconds: float) -> None:
    """Counts one question to a store, whatever its answer was."""
    _watch.tell(lambda instruments: instruments.lookup(seconds))


def observe_save(durable: bool, nbytes: int) -> None:
    """Counts a chunk that was to be saved."""
    _watch.tell(lambda instruments: instruments.save(durable, nbytes))


def use_meter(meter: Meter | None) -> None:
    """Reports to this meter instead of the global one; None reports nothing. For tests and for several providers."""
    _watch.use(lambda: meter, again=True)


def _may_have_provider() -> bool:
    """Returns whether the program may have set up an SDK: it then has imported the API, or has named a provider.

    Otherwise nothing would be recorded, so the API is not imported, which takes longer than importing cake_hf.
    """
    return "opentelemetry.metrics" in sys.modules or "OTEL_PYTHON_METER_PROVIDER" in os.environ


def _global_meter() -> Meter:
    """Returns the program's meter."""
    from opentelemetry.metrics import get_meter

    return get_meter("cake_hf")


class FaultLog:
    """The faults of one restore (or of one writer), shared by all its threads."""

    def __init__(self) -> None:
        self._told: dict[str, object] = {}

    def tell(self, kind: str, message: str, error: object) -> None:
        """Logs a fault as a warning if it is the first of its kind, otherwise at debug level; `message` has one `%s` for it."""
        mark = object()
        first = self._told.setdefault(kind, mark) is mark  # atomic, so no lock is needed
        logger.log(logging.WARNING if first else logging.DEBUG, message, error)

    def outcome_of(self, load: Callable[[], Outcome]) -> Outcome:
        """Runs a load of a chunk and returns how it ended. Nothing is raised: an error is logged, and is an outcome."""
        try:
            return load()
        except NewerChunk as error:
            self.tell("newer", "A stored chunk is of a later version and is computed instead. %s", error)
            return Outcome.MISSED
        except CorruptChunk as error:
            self.tell("corrupt", "A stored chunk is not usable and is computed instead. %s", error)
            return Outcome.CORRUPT
        except BaseException as error:
            # Whatever a store's client raises, even its own interrupt or panic, must not affect the prompt.
            self.tell(type(error).__name__, "A stored chunk cannot be read and is computed instead. %s", error)
            return Outcome.ERROR
