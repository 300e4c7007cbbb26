"""The fixed properties of each task: its suite, the length of an answer, its wording and its score.

Lengths, the tasks without a chat template, and metrics of LongBench are those of the benchmark (Bai et al., ACL 2024; v2: ACL
2025). SCBench (Li et al., ICLR 2025) has many turns about one context; its own scorer is not rebuilt here, its tasks get the
nearest plain metric.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGBENCH, LONGBENCH_V2, SCBENCH, GENERATED = "longbench", "longbench-v2", "scbench", "generated"


class UnknownTask(ValueError):
    """The task is unknown; the message lists those that are known."""


@dataclass(frozen=True)
class Task:
    """One task of a benchmark.

    Attributes:
        name: as the benchmark writes it, and so the `dataset` of its rows.
        suite: the benchmark.
        metric: name of the score; see `eval.scores`.
        new_tokens: the most tokens to generate.
        chat: whether the prompt goes through the model's chat template. Few-shot and completion tasks do not: there the text
            itself shows how to go on.
        first_line: only the first line of a prediction counts, since few-shot models continue with examples of their own.
        stop_at_newline: generation ends with the line.
        chinese: whether prompt and answer are Chinese.
    """

    name: str
    suite: str
    metric: str
    new_tokens: int
    chat: bool = True
    first_line: bool = False
    stop_at_newline: bool = False
    chinese: bool = False


def _longbench(name: str, metric: str, new_tokens: int, *, chat: bool = True, first_line: bool = False) -> Task:
    chinese = metric.endswith("_zh") or name == "lsht"
    return Task(name, LONGBENCH, metric, new_tokens, chat, first_line, name == "samsum", chinese)


_ALL = (
    _longbench("narrativeqa", "qa_f1", 128),
    _longbench("qasper", "qa_f1", 128),
    _longbench("multifieldqa_en", "qa_f1", 64),
    _longbench("multifieldqa_zh", "qa_f1_zh", 64),
    _longbench("hotpotqa", "qa_f1", 32),
    _longbench("2wikimqa", "qa_f1", 32),
    _longbench("musique", "qa_f1", 32),
    _longbench("dureader", "rouge_l_zh", 128),
    _longbench("gov_report", "rouge_l", 512),
    _longbench("qmsum", "rouge_l", 512),
    _longbench("multi_news", "rouge_l", 512),
    _longbench("vcsum", "rouge_l_zh", 512),
    _longbench("trec", "classification", 64, chat=False, first_line=True),
    _longbench("triviaqa", "qa_f1", 32, chat=False, first_line=True),
    _longbench("samsum", "rouge_l", 128, chat=False, first_line=True),
    _longbench("lsht", "classification", 64, chat=False, first_line=True),
    _longbench("passage_count", "count", 32),
    _longbench("passage_retrieval_en", "retrieval", 32),
    _longbench("passage_retrieval_zh", "retrieval_zh", 32),
    _longbench("lcc", "code_similarity", 64, chat=False),
    _longbench("repobench-p", "code_similarity", 64, chat=False),
    Task("longbench-v2", LONGBENCH_V2, "choice", 128),
    Task("scbench_kv", SCBENCH, "contains", 150),
    Task("scbench_prefix_suffix", SCBENCH, "contains", 150),
    Task("scbench_vt", SCBENCH, "contains", 30),
    Task("scbench_repoqa", SCBENCH, "contains", 1024),
    Task("scbench_qa_eng", SCBENCH, "qa_f1", 40),
    Task("scbench_qa_chn", SCBENCH, "qa_f1_zh", 40, chinese=True),
    Task("scbench_choice_eng", SCBENCH, "contains", 40),
    Task("scbench_many_shot", SCBENCH, "contains", 10),
    Task("scbench_summary", SCBENCH, "rouge_l", 200),
    Task("scbench_mf", SCBENCH, "contains", 5),
    Task("scbench_summary_with_needles", SCBENCH, "rouge_l", 800),
    Task("scbench_repoqa_and_kv", SCBENCH, "contains", 1024),
    Task("recall", GENERATED, "contains", 4, chat=False),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""All tasks by name. `recall` is our own: facts hidden in source code, which the package's small model finds again."""


def find_task(name: str) -> Task:
    """Returns the task of that name.

    Raises:
        UnknownTask: there is none; the message lists them.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise UnknownTask(f"Unknown task {name!r}; known are {', '.join(TASKS)}.") from None
