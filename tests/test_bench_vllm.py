"""The benchmark beside vLLM, without vLLM: what is asked when, and what is told."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import vllm_disk

ROOT = Path(__file__).parent.parent


def test_the_sides_take_turns_and_warm_up_first() -> None:
    asked: list[str] = []

    def side(name: str) -> vllm_disk.Ask:
        def ask() -> dict[str, Any]:
            asked.append(name)
            number = float(len(asked))
            return {"seconds": number, "cpu": number / 2, "loaded": 128, "threads": 1, "token": 7}

        return ask

    answers = vllm_disk.compare({"a": side("a"), "b": side("b")}, rounds=3)
    assert "".join(asked) == "ab" + "ab" * vllm_disk.WARM_UPS + "ababab"
    assert [one["seconds"] for one in answers["a"]] == [1, 7, 9, 11]  # the cold run, then the warm ones
    assert vllm_disk.table(answers).splitlines()[2:] == [
        "| a | 1.0 | 9.000 | 7.000 to 11.000 | 4.500 | 128 | 1 |",
        "| b | 2.0 | 10.000 | 8.000 to 12.000 | 5.000 | 128 | 1 |",
    ]


def test_a_side_answers_each_line_and_its_own_time_wins() -> None:
    told = io.StringIO()
    vllm_disk.serve(lambda: {"token": 1, "seconds": 0.5}, ["\n", "\n"], told)
    answers = [json.loads(line) for line in told.getvalue().splitlines()]
    assert len(answers) == 2
    assert all(one["seconds"] == 0.5 and one["cpu"] >= 0 for one in answers)


def test_a_prompt_is_always_the_same() -> None:
    assert vllm_disk.some_ids(300) == vllm_disk.some_ids(300)
    assert len(set(vllm_disk.some_ids(300))) > 200


def test_the_file_is_a_script_for_an_environment_without_our_packages() -> None:
    """vLLM's environment has none of them, so nothing but the standard library is imported at the top."""
    script = ROOT / "benchmarks" / "vllm_disk.py"
    ran = subprocess.run([sys.executable, "-I", "-S", script, "--help"], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert "--python" in ran.stdout
