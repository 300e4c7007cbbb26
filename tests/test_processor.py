"""What a processor is known by: all by which matrix libraries choose their kernels, and nothing that changes by itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import cake_hf.util.processor as module
from cake_hf.util.processor import described, processor

XEON = """\
processor\t: {number}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
cpu MHz\t\t: {mhz}
cpu cores\t: 2
cpuid level\t: 31
flags\t\t: fpu sse sse2 ssse3 fma avx avx2 avx512f avx512_bf16 amx_bf16 amx_tile {others}
bugs\t\t: spectre_v1 {others}
power management:

"""
ARM = """\
processor\t: {number}
BogoMIPS\t: 50.00
Features\t: fp asimd fphp asimdhp sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
CPU revision\t: 1

"""


def xeon(number: int = 0, mhz: float = 2100.0, others: str = "hypervisor") -> str:
    return XEON.format(number=number, mhz=mhz, others=others)


def test_a_processor_is_its_maker_its_model_and_its_vector_instructions() -> None:
    vectors = "amx_bf16 amx_tile avx avx2 avx512_bf16 avx512f fma sse sse2 ssse3"
    assert described(xeon()) == {
        "cpu vendor_id": "GenuineIntel",
        "cpu family": "6",
        "cpu model": "143",
        "instructions": dict.fromkeys(vectors.split(), True),
    }
    assert described(ARM.format(number=0, part="0xd40")) == {
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x1",
        "CPU part": "0xd40",
        "instructions": dict.fromkeys(["asimd", "asimdhp", "bf16", "fp", "fphp", "i8mm", "sve"], True),
    }


def test_what_changes_by_itself_does_not_count() -> None:
    """More cores, another clock, another kernel's mitigations: the same bits."""
    assert described(xeon() + xeon(1, 3000.5)) == described(xeon(others="ibrs stibp md_clear"))


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("GenuineIntel", "AuthenticAMD"),
        ("model\t\t: 143", "model\t\t: 207"),
        (" amx_tile", ""),
        ("avx512_bf16", "avx_vnni"),
    ],
)
def test_other_kernels_are_another_processor(there: str, instead: str) -> None:
    assert there in xeon()
    assert described(xeon().replace(there, instead)) != described(xeon())


def test_cores_of_two_kinds_are_both_told() -> None:
    both = described(ARM.format(number=1, part="0xd46") + ARM.format(number=0, part="0xd40"))
    assert both["CPU part"] == "0xd40, 0xd46"


@pytest.mark.parametrize("told", ["", "nothing that anybody knows", "flags\t\t: avx2\n"])
def test_a_file_without_a_model_says_nothing(told: str) -> None:
    assert described(told) == {}


@pytest.fixture
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "missing")


@pytest.mark.usefixtures("no_file")
def test_without_the_file_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 154 Stepping 3, GenuineIntel")
    assert processor.__wrapped__() == {"cpu": "Intel64 Family 6 Model 154 Stepping 3, GenuineIntel"}
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert processor.__wrapped__() == {"cpu": "AMD64"}


@pytest.mark.usefixtures("no_file")
def test_macos_tells_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    def sysctl(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "machdep.cpu.brand_string"
        return subprocess.CompletedProcess(command, 0, "Apple M3\n", "")

    def none(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(subprocess, "run", sysctl)
    assert processor.__wrapped__() == {"cpu": "Apple M3"}
    monkeypatch.setattr(subprocess, "run", none)
    assert processor.__wrapped__() == {"cpu": "arm"}


def test_this_machines_processor_is_known() -> None:
    assert processor() == processor() != {}
