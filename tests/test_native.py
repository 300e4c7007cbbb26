"""The library of the codecs in C: it is used where it fits, and stays within its buffers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cake_hf.chunks import lossless, native
from cake_hf.chunks.lossless_numpy import NumpyCodec
from cake_hf.chunks.native import NativeCodec, library
from scripted import load_script


def test_the_library_is_used_if_it_fits(built: Path, tmp_path: Path) -> None:
    found = library(built)
    assert found is not None
    assert found.cake_abi() == native.ABI
    assert library(tmp_path / "missing.so") is None
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert library(tmp_path / "broken.so") is None


def test_numpy_steps_in_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    found = library(built)
    monkeypatch.setattr(lossless, "library", lambda: None)
    assert isinstance(lossless.default_codec.__wrapped__(), NumpyCodec)
    monkeypatch.setattr(lossless, "library", lambda: found)
    assert isinstance(lossless.default_codec.__wrapped__(), NativeCodec)


def test_a_library_of_another_version_is_not_used(tmp_path: Path) -> None:
    build, source = load_script("build_native"), tmp_path / "other.c"
    source.write_text("int cake_abi(void) { return 999; }\n")
    build.SOURCES = (source,)
    if build.build(tmp_path / "other.so") is None:
        pytest.skip("no C compiler here")
    assert library(tmp_path / "other.so") is None


def test_without_a_compiler_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load_script("build_native").build(tmp_path / "a.so") is None
    monkeypatch.setenv("CC", "false")
    assert load_script("build_native").build(tmp_path / "b.so") is None
    assert len(capfd.readouterr().err.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_no_byte_beyond_a_buffer_is_touched(tmp_path: Path) -> None:
    """The same functions under AddressSanitizer, with buffers as long as they are said to be and not a byte longer."""
    build, program = load_script("build_native"), tmp_path / "fuzz"
    command = build.compiler()
    if not command:
        pytest.skip("no C compiler here")
    flags = [*build.LANGUAGE, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(Path(__file__).with_name("native_fuzz.c")), *map(str, build.SOURCES)]
    made = subprocess.run([*command, *flags, *sources, "-o", str(program)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this compiler has no AddressSanitizer: {made.stderr.splitlines()[-1:]}")
    run = subprocess.run([str(program), "1", "1500"], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    lossless_pieces, lossy_pieces = map(int, run.stdout.split()[:2])
    assert lossless_pieces > 500
    assert lossy_pieces > 500
