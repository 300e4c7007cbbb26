"""`python -m benchmarks traces`: options in, tables for people and one line of JSON out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.figures import Result
from benchmarks.machine import Machine
from benchmarks.settings import Dtype
from benchmarks.table import build_tables
from benchmarks.traces import tables
from benchmarks.traces.generating import KINDS, generate
from benchmarks.traces.methods import THRESHOLDS
from benchmarks.traces.reading import read_trace
from benchmarks.traces.replaying import BANDWIDTHS, Replay
from benchmarks.traces.requests import Trace
from benchmarks.traces.serving import MODELS, Serving
from cake_hf.assets import RECALL_TINY
from cake_hf.cli.console import WRONG, PlainErrors, console, progress_bar
from cake_hf.cli.models import load_model, load_tokenizer, quiet_transformers, refuse_too_long
from cake_hf.limits import MIN_CHUNK_SIZE

TRACES_HELP = (
    "Replay traces of prompts that share prefixes: on the simulator with the paper's cost curves, or with a model.\n\n"
    "`simulate` compares computing only, loading only, static thresholds and both ends over bandwidths, served alone and in a "
    "queue; `live` answers a smaller trace with a model that runs here; `turns` asks several questions about each "
    "document, in SCBench's form; `page` renders docs/traces.md from result files. --trace reads Mooncake's JSONL or token "
    "counts (see benchmarks/traces/reading.py); without it, traces with the statistics of published ones are generated."
)

PAGE = Path("docs/traces.md")
SHOWN_GBPS = 32.0

traces_app = typer.Typer(cls=PlainErrors, no_args_is_help=True, help=TRACES_HELP)

Paths = Annotated[list[Path] | None, typer.Option("--trace", help="A file with a trace; may be repeated.")]
Kinds = Annotated[list[str] | None, typer.Option(help=f"Generate such a trace: {', '.join(KINDS)}. May be repeated.")]
Requests = Annotated[int, typer.Option(min=1, help="The first so many requests of each trace.")]
Seed = Annotated[int, typer.Option(help="Of generated traces.")]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")]


@traces_app.command("simulate")
def simulate_traces(
    trace: Paths = None,
    kind: Kinds = None,
    requests: Requests = 1000,
    seed: Seed = 0,
    model: Annotated[str, typer.Option(help=f"One of the paper's models: {', '.join(MODELS)}.")] = "7B",
    gpu: Annotated[str, typer.Option(help="A100 or H100.")] = "A100",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gbps: Annotated[
        list[float] | None, typer.Option(help="Bandwidth to the store, 10^9 bits/s; may be repeated. The paper's.")
    ] = None,
    threshold: Annotated[
        list[int] | None, typer.Option(help="Load from so many stored tokens on; may be repeated.")
    ] = None,
    gib: Annotated[float | None, typer.Option(min=0, help="Size of the store in GiB; no limit by default.")] = None,
    warm: Annotated[int, typer.Option(min=0, help="So many requests before them only fill the store.")] = 0,
    load: Annotated[float, typer.Option(help="Share of the device that computing everything would use.")] = 0.7,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Replay traces on the simulator."""
    if model not in MODELS:
        raise ValueError(f"There is no model {model!r} in the paper; choose one of {', '.join(MODELS)}.")
    bandwidths = tuple(gbps or BANDWIDTHS)
    replay = Replay(Serving(MODELS[model], gpu, gpus), bandwidths, tuple(threshold or THRESHOLDS), gib, load, warm)
    machine, begin = Machine(), time.perf_counter()
    chosen = traces_of(trace or [], kind or [], warm + requests, seed)
    with progress_bar("replaying", "bandwidths") as progress:
        tick = partial(_tick, progress, count(1), len(chosen) * len(bandwidths))
        results = [replay.run(one, tick) for one in chosen]
    if not as_json:
        for sheet in (sheet for one in results for sheet in tables.sheets(one.title, one.details)):
            console.print(sheet)
    hand_out("simulate", machine, begin, results, as_json=as_json, out=out)


@traces_app.command("live")
def live_traces(
    trace: Paths = None,
    kind: Kinds = None,
    requests: Requests = 24,
    seed: Seed = 0,
    model: Annotated[str, typer.Option(help="Folder or name of the model that answers.")] = RECALL_TINY.name,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.FLOAT32,
    chunk_size: Annotated[int, typer.Option(min=MIN_CHUNK_SIZE, help="Tokens of a chunk.")] = 64,
    divide: Annotated[int, typer.Option(min=1, help="Blocks of the trace that become one chunk.")] = 1,
    most: Annotated[int, typer.Option(min=1, help="Chunks that a prompt is cut to.")] = 32,
    loading: Annotated[
        list[float] | None,
        typer.Option(help="Seconds to load a prompt over those to compute it; may be repeated. 0.5, 1, 2."),
    ] = None,
    threshold: Annotated[
        list[int] | None, typer.Option(help="Load from so many stored tokens of the shortened prompts on.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 4,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Answer a smaller trace with a model; all methods take turns."""
    from benchmarks.traces.live import Live
    from benchmarks.traces.prompts import Scale

    machine, begin = Machine(), time.perf_counter()
    chosen = traces_of(trace or [], kind or [], requests, seed)
    factors = loading or [0.5, 1.0, 2.0]
    if min(factors) <= 0:
        raise ValueError(f"Loading takes some time: give a number above 0, got {min(factors):g}.")
    with quiet_transformers():
        loaded = load_model(model, dtype.value, "cpu")
    refuse_too_long(loaded.config, (most + 1) * chunk_size + new_tokens, "choose a smaller --most or --chunk-size.")
    scale = Scale(chunk_size, divide, most)
    from_tokens = tuple(threshold or [4 * chunk_size, 8 * chunk_size])
    results = []
    with progress_bar("answering", "requests") as progress:
        for factor in factors:
            live = Live(loaded, scale, factor, from_tokens, new_tokens)
            results += [live.run(one, lambda done: progress(done, requests)) for one in chosen]
    about = {"model": Path(model).name, "dtype": dtype.value, "chunk_size": chunk_size}
    hand_out("live", machine, begin, results, as_json=as_json, out=out, about=about)
    if any(result.details["other_tokens"] for result in results):
        raise typer.Exit(WRONG)


@traces_app.command("turns")
def turns_command(
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="SCBench's tasks, LongBench's questions and few-shot tasks, or recall (our own); may be repeated."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="Folder with <task>.jsonl; by default the Hub.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Records of each task.")] = 4,
    turns: Annotated[int, typer.Option(min=2, help="Most questions about a document of LongBench.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 4096,
    chars: Annotated[
        int, typer.Option(min=1, help="Most characters of a document of LongBench, or of a made-up one.")
    ] = 8000,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Of each answer, instead of the task's number.")] = None,
    model: Annotated[str, typer.Option(help="Folder or name of the model.")] = RECALL_TINY.name,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights.")] = Dtype.FLOAT32,
    papers: Annotated[bool, typer.Option("--papers", help="Also other papers' methods, as in eval.methods.")] = False,
    less: Annotated[Path | None, typer.Option(help="Kernels of LESS for --papers.")] = None,
    shared: Annotated[Path | None, typer.Option(help="Layers of KVSharer for --papers.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    processor: Annotated[bool, typer.Option("--processor", help="Seconds are those of the processor.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Ask several questions about each document, with each method."""
    from benchmarks.traces.comparing import compare
    from benchmarks.traces.pressing import paper_methods
    from benchmarks.traces.questions import SHOTS, documents_of, gathered, many_shot
    from benchmarks.traces.turns import CLOCK, METHODS
    from eval.data.encode import Encoder
    from eval.data.prompts import load_templates
    from eval.data.shorten import CHARS_PER_TOKEN
    from eval.data.sources import Source, load_rows
    from eval.methods.contestants import chosen
    from eval.tasks import LONGBENCH, find_task

    methods = chosen(METHODS | (paper_methods(less, shared) if papers else {}), method or ())
    machine, begin = Machine(), time.perf_counter()
    with quiet_transformers():
        loaded, tokenizer = load_model(model, dtype.value, "cpu"), load_tokenizer(model)
    refuse_too_long(loaded.config, tokens, "choose fewer --tokens.")
    context = copy_context()
    if processor:
        context.run(CLOCK.set, time.process_time)
    templates, encoder = load_templates(), Encoder(tokenizer, tokens, truncate=False, new_tokens=new_tokens)
    results = []
    for one in map(find_task, task or ["recall"]):
        found = load_rows(one, Source(data, rows=rows, chars=chars)).rows
        if one.name in SHOTS:
            found = [turn for row in found for turn in many_shot(row, turns, chars)]
        elif (one.suite, one.metric) == (LONGBENCH, "qa_f1"):
            found = gathered(tokenizer, one, found, turns, chars // CHARS_PER_TOKEN)
        documents = list(documents_of(one, found, templates[one.name], encoder))
        with progress_bar(one.name, "answers") as progress:
            tick = partial(_tick, progress, count(1), len(documents) * len(methods))
            results.append(context.run(compare, loaded, tokenizer, one, documents, methods, tick))
    about = {"model": Path(model).name, "dtype": dtype.value, "processor": processor}
    hand_out("turns", machine, begin, results, as_json=as_json, out=out, about=about)


@traces_app.command("page")
def page_command(
    results: Annotated[list[Path], typer.Argument(help="Result files, in the order of the page.")],
    page: Annotated[Path, typer.Option(help="The page to fill.")] = PAGE,
) -> None:
    """Render the tables of a page from result files; those of one command share its place."""
    rendered: dict[str, list[str]] = {}
    for path in results:
        command, text = rendered_result(path)
        rendered.setdefault(command, []).append(text)
    for command, texts in rendered.items():
        tables.fill(page, f"traces {command}", "\n\n".join(texts))


def _tick(progress: Callable[[int, int], None], number: Iterator[int], total: int) -> None:
    progress(next(number), total)


def rendered_result(path: Path) -> tuple[str, str]:
    """Returns the command that wrote a result, and the text that a page has of it.

    Raises:
        ValueError: the file is no such result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The result {path} cannot be read; measure first, with --out.") from error
    if result.get("command") not in RENDERED:
        raise ValueError(f"{path} is no result of `python -m benchmarks traces`.")
    return result["command"], RENDERED[result["command"]](result)


def _rendered_simulation(result: dict[str, Any]) -> str:
    return tables.page(result["results"], SHOWN_GBPS)


RENDERED: dict[str, Callable[[dict[str, Any]], str]] = {
    "simulate": _rendered_simulation,
    "live": tables.live_page,
    "turns": tables.turns_page,
}
"""By command, the text of its place in the page."""


def traces_of(paths: Sequence[Path], kinds: Sequence[str], requests: int, seed: int) -> list[Trace]:
    """Returns the traces that the options ask for: files, generated kinds, or all kinds if neither is given.

    Raises:
        ValueError: two have the same name, so that their results could not be told apart.
    """
    read = [read_trace(path).first(requests) for path in paths]
    wanted = kinds or ([] if paths else list(KINDS))
    traces = [*read, *(generate(kind, requests, seed) for kind in wanted)]
    names = [one.name for one in traces]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two traces are called {twice[0]!r}; give each one once, and files different names.")
    return traces


def hand_out(
    command: str,
    machine: Machine,
    begin: float,
    results: Sequence[Result],
    *,
    as_json: bool,
    out: Path | None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Prints the figures and the line of JSON, and writes the latter to a file."""
    if not as_json:
        console.print(build_tables(results))
    outcome = {
        "command": command,
        "machine": machine.as_dict(),
        **(about or {}),
        "results": {result.title: result.as_dict() for result in results},
        "seconds": time.perf_counter() - begin,
    }
    line = json.dumps(outcome)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n", encoding="utf-8")
    typer.echo(line)
