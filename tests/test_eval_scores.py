"""LongBench's scores: values worked out by hand, the corners of each definition, and the packages of the benchmark."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.score import main, score_lines
from eval.scores import METRICS, BrokenAnswer, MissingSegmenter, rouge, score, text
from eval.scores.rouge import LONGEST_WALK, rouge_l
from eval.tasks import TASKS, UnknownTask, find_task

ROOT = Path(__file__).parent.parent
METRIC_SCRIPT = ROOT / "eval" / "metrics" / "longbench.py"

LONGBENCH_V1 = {
    "qa_f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    "qa_f1_zh": "multifieldqa_zh",
    "rouge_l": "gov_report qmsum multi_news samsum",
    "rouge_l_zh": "dureader vcsum",
    "classification": "trec lsht",
    "count": "passage_count",
    "retrieval": "passage_retrieval_en",
    "retrieval_zh": "passage_retrieval_zh",
    "code_similarity": "lcc repobench-p",
}


@pytest.fixture
def words_at_slashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for jieba that cuts at "/", so that tests say what the words are."""
    fake: Any = types.ModuleType("jieba")
    fake.setLogLevel = lambda level: None
    fake.cut = lambda text, cut_all: (word for word in text.split("/") if word)
    monkeypatch.setitem(sys.modules, "jieba", fake)
    text._jieba.cache_clear()
    yield
    text._jieba.cache_clear()


def scored(task: str, prediction: str, *answers: str, classes: list[str] | None = None) -> float:
    return score(find_task(task), prediction, answers, classes)


def test_all_21_tasks_have_the_metric_of_the_benchmark() -> None:
    wanted = {name: metric for metric, names in LONGBENCH_V1.items() for name in names.split()}
    assert len(wanted) == 21
    assert {task.name: task.metric for task in TASKS.values() if task.suite == "longbench"} == wanted
    assert {task.name for task in TASKS.values() if task.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    completions = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {task.name for task in TASKS.values() if task.suite == "longbench" and not task.chat} == completions


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Bob Dylan", "Bob Dylan", 1.0),
        ("  the BOB, dylan!! ", "Bob Dylan", 1.0),
        ("It was Bob Dylan.", "Bob Dylan", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
        ("yes yes", "yes", 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # a word counts as often as both have it
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
        ("x-ray", "x ray", 0.0),  # punctuation goes without leaving a space: "xray"
        ("theatre", "the atre", 0.0),  # articles are whole words
    ],
)
def test_qa_f1(prediction: str, answer: str, expected: float) -> None:
    assert scored("hotpotqa", prediction, answer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("words_at_slashes")
def test_qa_f1_in_chinese() -> None:
    assert scored("multifieldqa_zh", "财政/总/收入", "财政/收入") == pytest.approx(0.8)
    assert scored("multifieldqa_zh", "A/。/ /B", "a/b") == 1.0  # punctuation and spaces are no words
    assert scored("multifieldqa_zh", "《/a", "a") == pytest.approx(2 / 3)  # the one mark that the benchmark forgot
    assert scored("multifieldqa_zh", "》/a", "a") == 1.0


def f(common: int, predicted: int, expected: int) -> float:
    """ROUGE-L's F from counts of distinct words."""
    p, r = common / predicted, common / expected
    return 2 * p * r / (p + r + 1e-8)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "the cat sat", f(3, 3, 3)),
        ("the cat sat", "the dog sat", f(2, 3, 3)),
        ("a a a", "a", f(1, 1, 1)),  # words are sets
        ("b a", "a b", f(1, 2, 2)),
        ("a b. c d", "c d. a b", f(4, 4, 4)),  # sentences in another order: the union over all pairs
        ("a b", "a. b", f(2, 2, 2)),
        ("x. y", "a. b", 0.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("...", "a", 0.0),
        ("a. ", "a", f(1, 2, 1)),  # a sentence of a space is an empty word
        ("a\nb\t c", "a b c", f(3, 3, 3)),
        ("A", "a", 0.0),  # case counts
    ],
)
def test_rouge_l(prediction: str, answer: str, expected: float) -> None:
    assert scored("gov_report", prediction, answer) == pytest.approx(expected, abs=1e-12)


def test_which_of_two_longest_subsequences_is_walked() -> None:
    """On a tie it goes back in the prediction, and so comes upon the answer's last word."""
    assert rouge.common_words(["a", "b"], ["b", "a"]) == {"b"}


def test_rouge_against_a_recursive_walk() -> None:
    rng = random.Random(0)
    for _ in range(300):
        one, other = ([rng.choice("abcde") for _ in range(rng.randrange(9))] for _ in range(2))
        assert rouge.common_words(one, other) == set(recursive_walk(one, other))


def recursive_walk(expected: list[str], predicted: list[str]) -> list[str]:
    """The definition once more, as the benchmark's package has it: by recursion, on lengths found by recursion."""
    if not expected or not predicted:
        return []
    if expected[-1] == predicted[-1]:
        return [*recursive_walk(expected[:-1], predicted[:-1]), expected[-1]]
    if longest(expected[:-1], predicted) > longest(expected, predicted[:-1]):
        return recursive_walk(expected[:-1], predicted)
    return recursive_walk(expected, predicted[:-1])


def longest(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest(one[:-1], other[:-1])
    return max(longest(one[:-1], other), longest(one, other[:-1]))


def test_texts_too_long_for_the_benchmarks_recursion_score_nothing() -> None:
    fits = " ".join(["x"] * (LONGEST_WALK - 1) + ["a"])
    assert rouge_l("a " + fits, "a") > 0  # one step: the last words are equal
    assert rouge_l("a " + " ".join(["x"] * (LONGEST_WALK - 1)), "a") == pytest.approx(f(1, 2, 1))
    assert rouge_l("a " + " ".join(["x"] * LONGEST_WALK), "a") == 0.0


@pytest.mark.usefixtures("words_at_slashes")
def test_rouge_l_in_chinese() -> None:
    assert scored("vcsum", "教育/资源/共享", "教育/共享/。") == pytest.approx(f(2, 3, 3))


CLASSES = ["Date", "Invention", "Other entity", "Other", "Food"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Date", "Date", 1.0),
        ("Date or Food", "Date", 0.5),
        ("Food", "Date", 0.0),
        ("nothing", "Date", 0.0),
        ("Other entity", "Other entity", 1.0),  # it names "Other", too, which is part of the answer's own name
        ("Other entity", "Other", 0.5),
        ("\n\nDate\nFood", "Date", 1.0),  # the first line only
    ],
)
def test_classification(prediction: str, answer: str, expected: float) -> None:
    assert scored("trec", prediction, answer, classes=CLASSES) == expected


def test_classification_passes_over_the_class_that_moves_up() -> None:
    """Both "A" and "B" are part of "A B"; dropping "A" while going through the list lets "B" stay, as in the benchmark."""
    assert scored("lsht", "A B", "A B", classes=["A", "B", "A B"]) == 0.5
    assert scored("lsht", "A B", "A B", classes=["A B", "A"]) == 1.0


def test_classification_without_classes() -> None:
    with pytest.raises(BrokenAnswer, match="all_classes"):
        scored("trec", "Date", "Date")


@pytest.mark.parametrize(
    ("task", "prediction", "answer", "expected"),
    [
        ("passage_count", "46", "46", 1.0),
        ("passage_count", "46 or 47", "46", 0.5),
        ("passage_count", "046", "46", 0.0),
        ("passage_count", "many", "46", 0.0),
        ("passage_retrieval_en", "Paragraph 19", "Paragraph 19", 1.0),
        ("passage_retrieval_en", "19, 19 or 3", "Paragraph 19", 2 / 3),
        ("passage_retrieval_en", "Paragraph 1", "Paragraph 19", 0.0),
        ("passage_retrieval_zh", "段落5", "段落5", 1.0),
        ("passage_retrieval_zh", "5、6", "段落5", 0.5),
        ("longbench-v2", "The correct answer is (B).", "B", 1.0),
        ("longbench-v2", "**The correct answer is B**", "B", 1.0),
        ("longbench-v2", "The correct answer is (A), not (B).", "B", 0.0),
        ("longbench-v2", "The correct answer is B, no: The correct answer is (A)", "A", 1.0),  # parentheses first
        ("longbench-v2", "B", "B", 0.0),
        ("scbench_kv", "it is 7f-3a.", "7f-3a", 1.0),
        ("scbench_kv", "it is 7f", "7f-3a", 0.0),
    ],
)
def test_numbers_and_letters(task: str, prediction: str, answer: str, expected: float) -> None:
    assert scored(task, prediction, answer) == pytest.approx(expected)


def test_an_answer_without_a_paragraph() -> None:
    with pytest.raises(BrokenAnswer, match="names no paragraph"):
        scored("passage_retrieval_en", "3", "the third")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("    return x", "    return x", 1.0),
        ("\n\n    return x\n    more", "    return x", 1.0),
        ("# a comment\n```python\n// c\nreturn x", "return x", 1.0),
        ("# only a comment", "return x", 0.0),
        ("# only a comment", "", 1.0),  # nothing is equal to nothing
        ("abcd", "bcde", 0.75),
        ("abc", "abd", 0.67),  # whole hundredths
        ("", "x", 0.0),
    ],
)
def test_code_similarity(prediction: str, answer: str, expected: float) -> None:
    assert scored("lcc", prediction, answer) == pytest.approx(expected, abs=1e-12)


def test_the_best_answer_counts() -> None:
    assert scored("qasper", "5 percent", "five", "5 percent", "0.05") == 1.0
    assert scored("qasper", "5 percent") == 0.0


def test_only_the_first_line_of_few_shot_answers_counts() -> None:
    assert scored("triviaqa", "\n\n55\nPassage: 56", "55") == 1.0
    assert scored("qasper", "55\nPassage: 56", "55") < 1.0
    assert scored("samsum", "Emilia is angry\nDialogue: a", "Emilia is angry") == pytest.approx(f(3, 3, 3))


def test_chinese_without_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    text._jieba.cache_clear()
    with pytest.raises(MissingSegmenter, match="pip install"):
        scored("dureader", "a", "a")
    text._jieba.cache_clear()


def test_an_unknown_task_lists_the_tasks() -> None:
    with pytest.raises(UnknownTask, match=r"known are narrativeqa, qasper.*repobench-p.*longbench-v2"):
        find_task("quasper")


# The benchmark's own packages, where they are installed.


def random_texts(seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", ".", ". ", "dog", "A", "1", "12", "...", "\n", "x.y", ""]
    for _ in range(300):
        yield tuple(" ".join(rng.choices(vocabulary, k=rng.randrange(30))) for _ in range(2))  # type: ignore[misc]


def test_agrees_with_the_package_rouge() -> None:
    package = pytest.importorskip("rouge", reason="the benchmark's package; pip install rouge")
    for prediction, answer in random_texts(1):
        try:
            expected = package.Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        except ValueError:  # the benchmark scores what it cannot compare as 0
            expected = 0.0
        assert rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-9), (prediction, answer)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_package_fuzzywuzzy() -> None:
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="the benchmark's package; pip install fuzzywuzzy")
    for prediction, answer in random_texts(2):
        line = prediction.replace("\n", " ")
        assert scored("lcc", line, answer) == pytest.approx(fuzz.ratio(line, answer) / 100, abs=1e-9), (line, answer)


def test_agrees_with_jieba_words() -> None:
    pytest.importorskip("jieba", reason="cuts Chinese into words; pip install jieba")
    assert scored("multifieldqa_zh", "铜仁市的财政总收入增长了25.89%。", "铜仁市的财政总收入增长了25.89%") == 1.0
    assert 0 < scored("dureader", "体验服是逆战拿来测试新模式的", "测试服是逆战用来测试新版本的") < 1


# The command.


def rows_file(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(dataset: str, pred: object, answers: object, all_classes: object = None) -> dict[str, object]:
    return {"dataset": dataset, "pred": pred, "answers": answers, "all_classes": all_classes}


def test_score_prints_a_table_and_one_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows_file(
        tmp_path,
        row("qasper", "5 percent", ["5 percent"]),
        row("trec", "Date", ["Date"], ["Date", "Food"]),
        row("qasper", "none", ["5 percent"]),
    )
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {
        "per_row": [1.0, 1.0, 0.0],
        "per_task": {"qasper": 0.5, "trec": 1.0},
        "skipped": [],
    }
    assert any("qasper" in line and "50.00" in line for line in lines[:-1])


def test_broken_rows_are_counted_with_their_reason_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows_file(
        tmp_path,
        row("qasper", "yes", ["yes"]),
        "{not json",
        "[1, 2]",
        "",
        row("quasper", "yes", ["yes"]),
        row("qasper", None, ["yes"]),
        row("qasper", "yes", "yes"),
        row("trec", "Date", ["Date"]),
        {"dataset": "qasper"},
        row("qasper", "no", ["no"]),
    )
    assert main([str(path)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["per_row"] == [1.0, None, None, None, None, None, None, None, 1.0]
    assert found["per_task"] == {"qasper": 1.0}
    reasons = {entry["row"]: entry["reason"] for entry in found["skipped"]}
    for number, words in {
        1: "not JSON",
        2: "not a JSON object",
        3: "known are narrativeqa",
        4: "'pred' is not a text",
        5: "'answers' is not a list",
        6: "all_classes",
        7: "no 'pred'",
    }.items():
        assert words in reasons[number]
        assert f"row {number} skipped" in captured.err


def test_nothing_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl cannot be read" in capsys.readouterr().err
    assert main([str(rows_file(tmp_path, "{"))]) == 2
    assert score_lines([]).as_dict() == {"per_row": [], "per_task": {}, "skipped": []}


def test_score_runs_as_a_module_without_torch(tmp_path: Path) -> None:
    path = rows_file(tmp_path, row("hotpotqa", "Bob Dylan", ["Bob Dylan"]))
    script = (
        "import runpy, sys; sys.argv = ['score', sys.argv[1]]\n"
        "try: runpy.run_module('eval.score', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"


# As metrics of the evaluate library.


def test_evaluate_loads_the_metrics_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")

    def load(name: str) -> Any:
        return evaluate.load(str(METRIC_SCRIPT), name, cache_dir=str(tmp_path))

    predictions, references = ["It was Bob Dylan.", "\nno\nyes"], [["Bob Dylan"], ["yes", "no"]]
    for name in ("triviaqa", "gov_report", "lcc"):
        found = load(name).compute(predictions=predictions, references=references)
        expected = [scored(name, *pair[:1], *pair[1]) for pair in zip(predictions, references, strict=True)]
        assert found == {"score": sum(expected) / 2, "scores": expected}
    found = load("trec").compute(
        predictions=["Date", "x"], references=[["Date"], ["Food"]], all_classes=[CLASSES, CLASSES]
    )
    assert found == {"score": 0.5, "scores": [1.0, 0.0]}
    assert "choice" in METRICS
    assert load("choice").compute(predictions=["The correct answer is (A)"], references=[["A"]])["score"] == 1.0
    with pytest.raises(UnknownTask, match="Name a task or a score"):
        load("default")
