"""Watching: what is counted, that it is never in the way, and one log line per kind of fault."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from cake_hf import CakeCache, MemoryStore, Report
from cake_hf.testing.contract import run_together
from cake_hf.transfer import telemetry
from cake_hf.transfer.telemetry import FaultLog
from models import CHUNK, shared_model

REPORT = Report(
    tokens=130,
    chunk_size=16,
    chunks_computed=3,
    chunks_loaded=5,
    chunks_missed=2,
    chunks_failed=1,
    chunks_saved=7,
    bytes_loaded=5000,
    bytes_saved=7000,
    prefill_seconds=0.25,
)


@dataclass
class Recorded:
    """An instrument as OpenTelemetry's documentation describes it, that keeps what it is told."""

    name: str
    unit: str
    description: str
    bounds: Sequence[float] | None = None
    told: list[Any] = field(default_factory=list)

    def add(self, amount: int, attributes: Mapping[str, str] | None = None, context: object = None) -> None:
        assert amount >= 0, "a counter only goes up"
        self.told.append((amount, dict(attributes or {})))

    def record(self, amount: float, attributes: Mapping[str, str] | None = None, context: object = None) -> None:
        self.told.append(amount)


class FakeMeter:
    def __init__(self) -> None:
        self.made: dict[str, Recorded] = {}

    def create_counter(self, name: str, unit: str = "", description: str = "") -> Recorded:
        return self.made.setdefault(name, Recorded(name, unit, description))

    def create_histogram(
        self,
        name: str,
        unit: str = "",
        description: str = "",
        *,
        explicit_bucket_boundaries_advisory: Sequence[float] | None = None,
    ) -> Recorded:
        return self.made.setdefault(name, Recorded(name, unit, description, explicit_bucket_boundaries_advisory))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not watched anything yet."""
    monkeypatch.setattr(telemetry, "_watch", telemetry._Watch())


@pytest.fixture
def meter(fresh: None) -> FakeMeter:
    meter = FakeMeter()
    telemetry.use_meter(meter)
    return meter


def observe_everything() -> None:
    telemetry.observe_lookup(0.01)
    telemetry.observe(REPORT)
    telemetry.observe_save(True, 1000)
    telemetry.observe_save(False, 1000)


def test_the_meter_gets_every_count(meter: FakeMeter) -> None:
    observe_everything()
    assert meter.made["cake_hf.chunks"].told == [
        (5, {"cake_hf.outcome": "loaded"}),
        (3, {"cake_hf.outcome": "computed"}),
        (2, {"cake_hf.outcome": "missed"}),
        (1, {"cake_hf.outcome": "failed"}),
        (1, {"cake_hf.outcome": "saved"}),
        (1, {"cake_hf.outcome": "unsaved"}),
    ]
    assert meter.made["cake_hf.bytes"].told == [
        (5000, {"cake_hf.direction": "loaded"}),
        (1000, {"cake_hf.direction": "saved"}),
    ]
    assert meter.made["cake_hf.prefill.duration"].told == [0.25]
    assert meter.made["cake_hf.lookup.duration"].told == [0.01]


def test_counts_of_zero_are_not_reported(meter: FakeMeter) -> None:
    telemetry.observe(Report(tokens=5, reason="too short", prefill_seconds=0.1))
    assert meter.made["cake_hf.chunks"].told == meter.made["cake_hf.bytes"].told == []
    assert meter.made["cake_hf.prefill.duration"].told == [0.1]


def test_units_and_buckets_are_for_seconds(meter: FakeMeter) -> None:
    assert {name: made.unit for name, made in meter.made.items()} == {
        "cake_hf.chunks": "{chunk}",
        "cake_hf.bytes": "By",
        "cake_hf.prefill.duration": "s",
        "cake_hf.lookup.duration": "s",
        "cake_hf.ttft": "s",
        "cake_hf.requests": "{request}",
        "cake_hf.steps": "{step}",
    }
    for name in ("cake_hf.prefill.duration", "cake_hf.lookup.duration", "cake_hf.ttft"):
        bounds = meter.made[name].bounds
        assert bounds is not None
        assert list(bounds) == sorted(set(bounds))
        assert bounds[0] < 0.25 < bounds[-1]
    assert all(made.description.endswith(".") for made in meter.made.values())


@pytest.mark.parametrize("lost", ["opentelemetry", "opentelemetry.metrics", "get_meter"])
def test_an_api_that_cannot_be_imported_is_said_once_and_stops_nothing(
    fresh: None, lost: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a dependency: without it, or with parts of it, the installation is broken."""
    monkeypatch.setenv("OTEL_PYTHON_METER_PROVIDER", "sdk_meter_provider")
    if lost == "get_meter":
        monkeypatch.setitem(sys.modules, "opentelemetry", ModuleType("opentelemetry"))
        monkeypatch.setitem(sys.modules, "opentelemetry.metrics", ModuleType("opentelemetry.metrics"))
    else:
        monkeypatch.delitem(sys.modules, "opentelemetry.metrics", raising=False)
        monkeypatch.setitem(sys.modules, lost, None)  # what makes an import fail
    observe_everything()
    observe_everything()
    assert telemetry._watch._instruments is None
    assert [message for message in caplog.messages if "OpenTelemetry" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_provider_that_raises_stops_nothing(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("no provider")

    monkeypatch.setattr("opentelemetry.metrics.get_meter", fail)
    observe_everything()
    assert telemetry._watch._instruments is None


@pytest.mark.parametrize("sign", ["imported", "named"])
def test_the_api_is_not_imported_for_a_program_that_has_set_up_nothing(
    fresh: None, sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that sets up an SDK has imported the API, or names a provider in the environment."""
    metrics = importlib.import_module("opentelemetry.metrics")
    monkeypatch.delitem(sys.modules, "opentelemetry.metrics")
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK):
        observe_everything()
    assert telemetry._watch._instruments is None
    assert "opentelemetry.metrics" not in sys.modules
    if sign == "imported":
        monkeypatch.setitem(sys.modules, "opentelemetry.metrics", metrics)
    else:
        monkeypatch.setenv("OTEL_PYTHON_METER_PROVIDER", "default_meter_provider")
    observe_everything()
    assert telemetry._watch._instruments is not None


def test_the_global_meter_is_asked_for_once_and_late(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing cake_hf must not import OpenTelemetry; the API hands out a meter that follows the SDK set up later."""
    asked: list[str] = []
    meter = FakeMeter()
    package, metrics = ModuleType("opentelemetry"), ModuleType("opentelemetry.metrics")

    def get_meter(name: str) -> FakeMeter:
        asked.append(name)
        return meter

    metrics.get_meter = get_meter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opentelemetry", package)
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", metrics)
    assert asked == []
    observe_everything()
    observe_everything()
    assert asked == ["cake_hf"]
    assert meter.made["cake_hf.lookup.duration"].told == [0.01, 0.01]


def test_observations_without_a_meter_do_nothing(fresh: None) -> None:
    telemetry.use_meter(None)
    observe_everything()


def test_an_instrument_that_raises_stops_nothing(meter: FakeMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the exporter is gone")

    monkeypatch.setattr(Recorded, "add", fail)
    monkeypatch.setattr(Recorded, "record", fail)
    observe_everything()


def test_an_older_api_is_said_once_and_stops_nothing(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    class OldMeter(FakeMeter):
        def create_histogram(self, name: str, unit: str = "", description: str = "") -> Recorded:  # type: ignore[override]
            return Recorded(name, unit, description)

    telemetry.use_meter(OldMeter())
    observe_everything()
    assert [message for message in caplog.messages if "1.30 or newer" in message] == caplog.messages
    assert len(caplog.messages) == 1


# One line per kind.


def test_a_kind_of_fault_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="cake_hf"):
        log = FaultLog()
        for number in range(3):
            log.tell("corrupt", "A chunk is computed instead. %s", f"fault {number}")
            log.tell("error", "A chunk cannot be read. %s", f"fault {number}")
        FaultLog().tell("corrupt", "A chunk is computed instead. %s", "another restore")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "A chunk is computed instead. fault 0",
        "A chunk cannot be read. fault 0",
        "A chunk is computed instead. another restore",
    ]
    assert len(caplog.records) == 7, "the others are there for who debugs"


def test_a_fault_seen_by_many_threads_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = FaultLog()
    run_together([lambda: log.tell("error", "Broken. %s", "x")] * 8)
    assert caplog.messages == ["Broken. x"]


# The real thing.


def test_the_real_sdk_collects_it(fresh: None) -> None:
    """What the fakes above stand for: instruments made by OpenTelemetry's own SDK, read as an exporter reads them."""
    sdk = pytest.importorskip("opentelemetry.sdk.metrics", reason="the extra telemetry is not installed")
    export = importlib.import_module("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    try:
        telemetry.use_meter(provider.get_meter("cake_hf"))
        observe_everything()
        observe_everything()
        [resource] = reader.get_metrics_data().resource_metrics
    finally:
        provider.shutdown()
    [scope] = resource.scope_metrics
    assert scope.scope.name == "cake_hf"
    metrics = {metric.name: metric for metric in scope.metrics}
    assert {name: metric.unit for name, metric in metrics.items()} == {
        "cake_hf.chunks": "{chunk}",
        "cake_hf.bytes": "By",
        "cake_hf.prefill.duration": "s",
        "cake_hf.lookup.duration": "s",
    }
    chunks = metrics["cake_hf.chunks"].data
    assert chunks.is_monotonic
    assert {point.attributes["cake_hf.outcome"]: point.value for point in chunks.data_points} == {
        "loaded": 10,
        "computed": 6,
        "missed": 4,
        "failed": 2,
        "saved": 2,
        "unsaved": 2,
    }
    assert {
        point.attributes["cake_hf.direction"]: point.value for point in metrics["cake_hf.bytes"].data.data_points
    } == {
        "loaded": 10_000,
        "saved": 2_000,
    }
    [prefill] = metrics["cake_hf.prefill.duration"].data.data_points
    assert (prefill.count, prefill.sum) == (2, 0.5)
    assert prefill.explicit_bounds == telemetry.SECONDS, "the SDK's own bounds are for milliseconds"
    assert sum(prefill.bucket_counts[:-1]) == 2


def test_the_real_api_without_an_sdk_does_nothing(fresh: None) -> None:
    """Its instruments are made once and take everything."""
    importlib.import_module("opentelemetry.metrics")
    observe_everything()
    assert telemetry._watch._instruments is not None
