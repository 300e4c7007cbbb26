"""The output of the demonstration."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cake_hf.cli.console import console
from cake_hf.cli.sheets import Bar, Bars, Lanes
from cake_hf.util.sizes import bytes_text, seconds_text
from demo.asking import Answer
from demo.race import Race
from demo.task import Task


def show_task(task: Task, model: str, chunk_size: int) -> None:
    """Shows the text and the question."""
    tokens = task.ids.shape[1]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("model", Text(model))
    facts.add_row("prompt", f"{tokens:,} tokens: {task.source}")
    facts.add_row("chunks", f"{(tokens - 1) // chunk_size} of {chunk_size} tokens, and a suffix")
    facts.add_row("question", Text(task.question, style="bold"))
    if task.answer:
        facts.add_row("right answer", Text(task.answer.strip(), style="bold green"))
    console.print(Panel(facts, title="one question about a long text", title_align="left", border_style="cyan"))


def show_warm(task: Task, tokenizer: Any, oracle: Answer, cold: Answer, warm: Answer) -> None:
    """Shows the three runs side by side, and the course of the warm one."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True)
    table.add_column("answer")
    for heading in ("logits", "computed", "loaded", "first token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("transformers", _said(task, tokenizer, oracle), "", "", "", seconds_text(oracle.ttft))
    for name, answer in (("cold process", cold), ("warm process", warm)):
        report = answer.report
        table.add_row(
            name,
            _said(task, tokenizer, answer),
            _equal_or_not(answer.same_logits(oracle)),
            str(report.chunks_computed),
            str(report.chunks_loaded),
            Text(seconds_text(answer.ttft), style="bold"),
        )
    console.print(Rule("1  the same prompt, asked again", align="left", style="dim"))
    console.print(table)
    faster = cold.ttft / max(1e-9, warm.ttft)
    _show_lanes(f"First token {faster:.1f} times sooner when warm. Which side brought each chunk, and when:", warm)


def show_race(race: Race) -> None:
    """Shows the strategies' times, and how both sides met."""
    rate = f"{bytes_text(race.bytes_per_second)}/s"
    rounds = len(race.runs["both"])
    console.print(Rule("2  a store as slow as the model", align="left", style="dim"))
    middle = race.middle_run("both")
    computed, loaded = middle.report.chunks_computed, middle.report.chunks_loaded
    if not loaded:
        console.print(
            f"No chunk was loaded at {rate}, so there was no race: the first run, which sets the rate, was slower than the "
            "later ones. Run the demonstration again when the machine is less busy.\n"
        )
        return
    console.print(
        f"Throttled to {rate}, which is as fast as a first run computed the KV. Time to the first token, "
        f"median of {rounds}:\n"
    )
    console.print(
        Bars(
            [
                Bar("compute only", race.seconds("compute"), "dark_orange"),
                Bar("load only", race.seconds("load"), "dodger_blue3"),
                Bar("both ends", race.seconds("both"), "green", f"{race.gain:.2f}x"),
            ]
        )
    )
    _show_lanes(f"\n{computed} chunks were computed from the front while {loaded} came from the back:", middle)


def show_verdict(logits: bool, answers: bool) -> None:
    """Shows whether all runs agree."""
    if logits and answers:
        text = "All runs gave the same answer, from logits bit for bit equal to those of transformers alone."
        console.print(Text(text, style="bold green"))
        return
    wrong = " and ".join(name for name, same in (("logits", logits), ("answers", answers)) if not same)
    console.print(
        Text(f"The {wrong} differ from those of transformers alone, which must not happen.", style="bold red")
    )


def _show_lanes(heading: str, answer: Answer) -> None:
    console.print(heading)
    console.print(Lanes(answer.report))
    console.print()


def _equal_or_not(equal: bool) -> Text:
    return Text("equal", style="green") if equal else Text("DIFFER", style="bold red")


def _said(task: Task, tokenizer: Any, answer: Answer) -> Text:
    said = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    if not task.answer:
        return Text(said)
    right = said == task.answer.strip()
    return Text(f"{said} ({'right' if right else 'wrong'})", style="green" if right else "red")
