"""Several engines on one store, in one process and in several: each restores what another has saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cake_hf
from engine_runs import (
    CHUNKS,
    COMPANY,
    DOCUMENT,
    alike,
    generated_kv,
    is_restored,
    needs_engine,
    plain_company,
    served,
    stepping,
)
from models import shared_model
from servers import Relay, S3Server
from test_remote_restore import Place
from waiting import PATIENCE, join_loaders

pytestmark = needs_engine
pytest_plugins = ["servers"]


@pytest.fixture(params=["directory", "s3", "redis"])
def address(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    relay_to: Callable[[int], Relay],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Where a store is: a path, or the URL of a real server."""
    if request.param == "directory":
        return str(tmp_path / "store")
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    return Place(server, relay_to(server.port), monkeypatch).url


def test_two_engines_share_what_they_compute(address: str) -> None:
    model = shared_model("llama")
    with stepping(model, address) as first, stepping(model, address, strategy="load") as second:
        for steps, loaded in ((first, 0), (second, CHUNKS)):
            for number, ids in enumerate(COMPANY):
                steps.add(str(number), ids)
            steps.run(until=lambda steps=steps: is_restored(steps, "1"))  # type: ignore[misc]
            assert alike(steps.kv("1", CHUNKS), generated_kv())
            steps.run()
            assert [steps.tokens(str(number)) for number in range(len(COMPANY))] == plain_company()
            report: Any = steps.manager.report("1")
            assert (report.chunks_loaded, report.chunks_failed) == (loaded, 0)
            assert steps.manager.flush(PATIENCE)
    join_loaders()


SERVER = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import engine_runs
from models import shared_model

tokens, reports = engine_runs.served(shared_model("llama"), engine_runs.COMPANY, sys.argv[2], strategy="load")
print(json.dumps([tokens, reports[1].chunks_loaded, reports[1].chunks_saved]))
"""


def test_an_engine_restores_what_one_of_another_process_has_saved(tmp_path: Path) -> None:
    paths = [str(Path(cake_hf.__path__[0]).parent), str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    for loaded in (0, CHUNKS):
        command = [sys.executable, "-c", SERVER, json.dumps(paths), str(tmp_path / "store")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
        assert json.loads(done.stdout.splitlines()[-1]) == [plain_company(), loaded, CHUNKS - loaded]
    tokens, reports = served(shared_model("llama"), [DOCUMENT], str(tmp_path / "store"), strategy="load")
    assert (tokens, reports[0].chunks_loaded) == ([plain_company()[1]], CHUNKS)
