"""A result as tables: for a terminal, and as Markdown for the documentation and the README."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cake_hf.cli.sheets import Sheet
from cake_hf.util.sizes import count_text
from eval.walk.ways import COLD, COPIED, NEW, RECIPE, SINGLE, TORCH_LOAD, WAYS

HEADINGS = ("document", "question", "first token", "last token", "CPU", "loaded", "tokens", "bits")
RATIO = "cake_hf's time over the other's"
RATIO_HEADINGS = ("median", "from, to", "goal", "met")
BUSY = 0.5
"""Load average for each core above which a machine counts as busy."""

IN_README = (SINGLE, COLD, RECIPE, COPIED, TORCH_LOAD, NEW)


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for each way and question: its name, and cells under `HEADINGS`."""
    return [[name, *_cells(document, found)] for name, found in groups(document)]


def groups(document: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Returns the measurements by way and question, with a name for people."""
    for way, name in WAYS.items():
        for question in range(len(document["questions"])):
            found = [one for one in document["taken"] if (one["way"], one["question"]) == (way, question)]
            if found:
                yield name if question == 0 else "and a second question", found


def seconds(found: Sequence[Mapping[str, Any]], *names: str) -> float:
    """Returns the median of the sum of these, each of which is a number, or seconds by kind."""
    return median(sum(_sum(one[name]) for name in names) for one in found)


def _sum(value: Any) -> float:
    return float(sum(value.values())) if isinstance(value, Mapping) else float(value)


def _cells(document: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[str]:
    question, chunks = found[0]["question"], found[0]["loaded"] + found[0]["computed"]
    reference = SINGLE if question == 0 else RECIPE
    tokens = next(one["tokens"] for one in document["taken"] if (one["way"], one["question"]) == (reference, question))
    bits = document["expected"][question]["digests"]
    prepared = seconds(found, "prepared")
    return [
        _figure(prepared) if prepared else "",
        _figure(seconds(found, "asked")),
        _figure(seconds(found, "prepared", "asked")),
        _figure(seconds(found, "prepared", "answered")),
        _figure(seconds(found, "cpu")),
        f"{found[0]['loaded']} of {chunks}" if chunks else "",
        _share(found, "tokens", tokens),
        _share(found, "digests", bits),
    ]


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.995 else f"{value:.3f}"


def _share(found: Sequence[Mapping[str, Any]], name: str, expected: object) -> str:
    same = sum(one[name] == expected for one in found)
    return "same" if same == len(found) else "other" if not same else f"{same} of {len(found)} same"


def answers(document: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Returns each question, with its answers, each on one line, and the ways that gave it."""
    for number, question in enumerate(document["questions"]):
        given: dict[str, dict[str, None]] = {}
        for one in document["taken"]:
            if one["question"] == number:
                given.setdefault(" ".join(one["text"].split()), {})[WAYS[one["way"]]] = None
        everybody = len(given) == 1
        yield question["text"], [(text, "all" if everybody else "; ".join(ways)) for text, ways in given.items()]


def goal_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Yields label, figure, spread, goal, and whether it was met."""
    return [
        [
            figure["label"],
            f"{figure['value']:.2f}",
            f"{figure['low']:.2f} to {figure['high']:.2f}",
            figure["goal"] or "",
            {None: "", True: "yes", False: "no"}[figure["met"]],
        ]
        for figure in document["goals"].values()
    ]


def sheets(document: Mapping[str, Any]) -> Iterator[Sheet]:
    """Returns the tables for a terminal."""
    title = f"{document['document']}: {_length(document)}"
    yield Sheet(title, ("<way", *HEADINGS), rows(document))
    yield Sheet("", (f"<{RATIO}", *RATIO_HEADINGS), goal_rows(document))


def page(result: Mapping[str, Any]) -> str:
    """Returns a whole result, as Markdown."""
    parts = [_setting(result)]
    for document in result["documents"]:
        parts += [f"### {_length(document)}", _markdown(("", *HEADINGS), rows(document))]
        parts += [_markdown((RATIO, *RATIO_HEADINGS), goal_rows(document))]
        parts += [_on_disk(document), _answers(document)]
    if result["broken"]:
        parts.append("**Not equal:** " + "; ".join(result["broken"]) + ".")
    return "\n\n".join(parts)


def readme(result: Mapping[str, Any]) -> str:
    """Returns the few figures of the longest document that the README shows."""
    document = longest(result)
    by_way = {found[0]["way"]: found for _, found in groups(document) if found[0]["question"] == 0}
    shown = []
    for way in IN_README:
        first = ("asked",) if way in (RECIPE, COPIED) else ("prepared", "asked")
        shown.append([WAYS[way], _figure(seconds(by_way[way], *first))])
    ran, threads = result["machine"], count_text(result["threads"], "thread")
    where = f"{ran['cpu']}, {ran['cores']} cores, {threads}, no GPU; load average {ran['load_average_before']}"
    table = _markdown((f"a question on {document['tokens']:,} tokens", "first token, s"), shown)
    return f"{table}\n\n{result['model']} in {result['dtype']}, {where}.{busy(result)}"


def longest(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the document with the most tokens."""
    found: Mapping[str, Any] = max(result["documents"], key=lambda document: document["tokens"])
    return found


def fill(path: Path, text: str) -> None:
    """Puts a text between `<!-- walk -->` and `<!-- end of walk -->` in a page.

    Raises:
        ValueError: the page has no such place.
    """
    before = path.read_text(encoding="utf-8")
    after, count = PLACE.subn(lambda found: f"{found[1]}\n{text}\n{found[2]}", before)
    if count != 1:
        raise ValueError(f"{path} has {count} places for the walk; one is wanted.")
    path.write_text(after, encoding="utf-8")


PLACE = re.compile(r"(<!-- walk -->)\n.*?(<!-- end of walk -->)", re.DOTALL)


def machine(result: Mapping[str, Any]) -> str:
    """Describes the machine."""
    ran = result["machine"]
    versions = ", ".join(f"{name} {ran[name]}" for name in ("python", "torch", "transformers", "cake_hf"))
    stolen = f", {ran['stolen_share']:.1%} of its time stolen by other machines" if ran.get("stolen_share") else ""
    load = f"load average before it began: {ran['load_average_before']}"
    threads = count_text(result["threads"], "thread")
    return f"{ran['cpu']}, {ran['cores']} cores, {ran['memory_gib']} GiB, no GPU; {threads}; {versions}; {load}{stolen}"


def busy(result: Mapping[str, Any]) -> str:
    """Returns a warning if other programs used a good part of the machine; else nothing."""
    ran = result["machine"]
    if (ran["load_average_before"] or 0) <= BUSY * ran["cores"]:
        return ""
    return " **The machine was busy: only the CPU seconds can be compared.**"


def _setting(result: Mapping[str, Any]) -> str:
    how = f"chunks of {result['chunk_size']} tokens, answers of {result['tokens']} tokens"
    return f"**{result['model']}** in {result['dtype']}, {how}. Measured on {machine(result)}.{busy(result)}"


def _length(document: Mapping[str, Any]) -> str:
    return f"{document['tokens']:,} tokens, {count_text(document['rounds'], 'round')}"


def _on_disk(document: Mapping[str, Any]) -> str:
    sizes = document["on_disk"]
    cold = next(found for _, found in groups(document) if found[0]["way"] == COLD)
    ours, theirs = seconds(cold, "after"), median(document["save_seconds"])
    return (
        f"On disk: {sizes[NEW] / 1e6:.1f} MB in the store of cake_hf, {sizes[TORCH_LOAD] / 1e6:.1f} MB by `torch.save`. "
        f"After its first answer cake_hf took {_figure(ours)} s more to save; `torch.save` took {_figure(theirs)} s."
    )


def _answers(document: Mapping[str, Any]) -> str:
    lines = [f"Answers, from *{document['document']}*:"]
    for question, given in answers(document):
        lines.append(f"* {question}")
        for text, ways in given:
            lines.append(f"  * {ways}: `{text.replace('`', '')}`")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
