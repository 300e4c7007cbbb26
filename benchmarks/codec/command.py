"""`python -m benchmarks codec`: options in, a table for people and one line of JSON out."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.codec import beside, lossy, speed
from benchmarks.codec.real_kv import RealKv, keep, kept, real_kv
from benchmarks.figures import Result
from benchmarks.machine import Machine, disturbance
from benchmarks.table import build_tables
from cake_hf.chunks.lossless import is_native
from cake_hf.cli.console import console, errors
from cake_hf.cli.models import load_model, load_tokenizer, quiet_transformers, read_text
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.testing.haystack import real_text

CODEC_HELP = (
    "Measure the codecs on the KV that a model makes of texts: sizes, decoding and encoding per thread; of the lossless "
    "one also several threads at once, and the main thread's forward beside a thread that loads.\n\n"
    "Speeds are in GB of raw KV per second of the thread's own CPU time where nothing else is said. Goals never decide the "
    "exit code."
)

OWN_TEXT = "standard-library"


def codec_command(
    model: Annotated[str, typer.Option(help="Folder or name of the model.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; may be repeated. By default the standard library's source.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=MIN_CHUNK_SIZE, help="Of each text.")] = 1024,
    chunk_size: Annotated[list[int] | None, typer.Option(help="Tokens per chunk; 128 and 512.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each measures everything once.")] = 7,
    kv: Annotated[
        Path | None, typer.Option(help="Keep the KV in this folder; with no --text, measure what was kept there.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")] = False,
) -> None:
    """Measure the codec; see CODEC_HELP."""
    begin, machine = time.perf_counter(), Machine()
    sizes = chunk_size or [size for size in (128, 512) if size <= tokens] or [tokens]
    with quiet_transformers():
        loaded = load_model(model, "bfloat16", "cpu")
    found = _kv(loaded, model, text or [], tokens, min(sizes), kv)
    if (shortest := min(one.tokens for one in found)) < max(sizes):
        raise ValueError(f"A text of {shortest} tokens has no chunk of {max(sizes)}; choose a smaller --chunk-size.")
    results = _measured(loaded, found, sizes, rounds, (lambda line: None) if as_json else _tell)
    outcome = {
        "machine": machine.as_dict(),
        "model": Path(model).name,
        "native": is_native(),
        "results": {name: result.as_dict() for name, result in results.items()},
        "seconds": time.perf_counter() - begin,
    }
    if not as_json:
        console.print(build_tables(results.values()))
        if told := disturbance(machine.as_dict()):
            console.print(told, style="yellow")
    line = json.dumps(outcome)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    typer.echo(line)


def _kv(
    model: Any, name: str, texts: Sequence[Path], tokens: int, chunk_size: int, folder: Path | None
) -> list[RealKv]:
    if not texts and folder is not None and (found := kept(folder)):
        return found
    tokenizer = load_tokenizer(name)
    written = {path.stem: read_text(path) for path in texts} or {OWN_TEXT: real_text(8 * tokens)}
    made = [real_kv(model, tokenizer, stem, text, tokens, chunk_size) for stem, text in written.items()]
    for one in made if folder is not None else ():
        assert folder is not None
        keep(one, folder)
    return made


def _measured(model: Any, texts: Sequence[RealKv], sizes: Sequence[int], rounds: int, tell: Any) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for chunk_size in sizes:
        for kv in texts:
            tell(f"measuring {kv.name}, chunks of {chunk_size} ...")
            results[f"{kv.name}_{chunk_size}"] = speed.measure(kv, chunk_size, rounds)
        tell(f"measuring the lossy codecs, chunks of {chunk_size} ...")
        results[f"lossy_{chunk_size}"] = lossy.measure(texts[0], chunk_size, rounds)
        results[f"header_{chunk_size}"] = speed.measure_header(texts[0], chunk_size, rounds)
        cores = range(1, (os.cpu_count() or 1) + 1)
        results[f"together_{chunk_size}"] = speed.measure_together(texts[0], chunk_size, rounds, cores)
    tell("measuring the main thread beside loads ...")
    with tempfile.TemporaryDirectory(prefix="cake-bench-") as folder:
        results["beside"] = beside.measure(model, texts[0], min(sizes), 3 * rounds, Path(folder))
    return results


def _tell(line: str) -> None:
    errors.print(line, style="dim")
