"""The cache under any name, models from elsewhere, and the next likely changes of transformers: right tokens in any case.

The canaries change transformers as its next releases may, and say that its version is one that was not tested.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationMixin, LlamaForCausalLM, cache_utils
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama
from transformers.utils import ModelOutput

import cake_hf
from cake_hf import CakeCache, MemoryStore, Report, reads_only
from cake_hf.cache import self_check as selfcheck
from cake_hf.layers import TokenMajorLayer, compat
from cake_hf.report import Refusal
from cake_hf.restore import support
from families import family_model
from models import CHUNK, CHUNKS, TAIL, VOCABULARY, build, prompt, run, shared_model
from naming import NAME, given
from portable_chunks import IDS, VERSIONS, kept_chunks, portable_cache
from stored import filled_store

SOURCE = Path(cake_hf.__path__[0])
ROOT = Path(__file__).parent.parent
OURS = [path for folder in (SOURCE, ROOT / "benchmarks", ROOT / "demo") for path in sorted(folder.rglob("*.py"))]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once per process is said once per test."""
    monkeypatch.setattr(support, "_told", set())


def plain_tokens() -> torch.Tensor:
    """What transformers gives by itself; taken before a test changes it."""
    model: Any = shared_model("llama")
    return model.generate(prompt(), **OPTIONS)


def twice(model: Any, expected: torch.Tensor, **options: Any) -> list[Report]:
    """Generate with an empty store and again from it; the tokens have to be right both times."""
    store, reports = MemoryStore(), []
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS, **options), expected)
            assert cache.flush(60)
            reports.append(cache.report)
    return reports


def assert_loaded(model: Any, store: MemoryStore) -> None:
    """The prompt is restored from the store, which has all of it."""
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain_tokens())
        assert cache.report.chunks_loaded == CHUNKS


def assert_restored(reports: list[Report]) -> None:
    assert [report.chunks_loaded for report in reports] == [0, CHUNKS], reports


def assert_plain(reports: list[Report], caplog: pytest.LogCaptureFixture) -> None:
    """Computed plainly, with the reason, and said once."""
    assert [report.chunks_loaded for report in reports] == [0, 0]
    assert all(report.reason for report in reports), reports
    lines = [record.message for record in caplog.records if record.name == "cake_hf"]
    assert len(lines) == 1, lines


# The names.


def names_in(source: str) -> set[str]:
    """Where a source names the cache of a call: keywords, attributes, parameters and strings, but for docstrings."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in compat.CACHE_NAMES:
            found.add(f"{node.arg}=")
        if isinstance(node, (ast.Attribute, ast.arg, ast.Name)):
            name = getattr(node, "attr", None) or getattr(node, "arg", None) or getattr(node, "id", None)
            found |= {name} & set(compat.CACHE_NAMES[1:])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= {name for name in compat.CACHE_NAMES[1:] if name in node.value}
        keys = [node.slice] if isinstance(node, ast.Subscript) else node.keys if isinstance(node, ast.Dict) else []
        found |= {key.value for key in keys if isinstance(key, ast.Constant)} & set(compat.CACHE_NAMES)
    return found


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_one_module_names_the_cache(path: Path) -> None:
    if path.name != "compat.py" and path != SOURCE / "__init__.py":  # the package's face names a folder
        assert names_in(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "source",
    [
        "model(ids, past_key_values=kept)",
        "model(ids, cache=kept)",
        "kwargs['cache']",
        "output.past_key_values",
        "print('generate(past_key_values=c)')",
        "def forward(self, past_key_values): ...",
    ],
)
def test_uses_of_transformers_names_are_found(source: str) -> None:
    assert names_in(source)


def test_either_name_where_transformers_takes_it() -> None:
    """Also one after the other with one store; the old name in `generate` makes transformers warn, never us."""
    model: Any = shared_model("llama")
    expected, store, used = plain_tokens(), MemoryStore(), 0
    for name in compat.CACHE_NAMES:
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore" if name != NAME else "error", FutureWarning)
            try:
                tokens = model.generate(prompt(), **{name: cache}, **OPTIONS)
            except ValueError:  # only for the new name, on versions before it
                assert name != NAME
                continue
            assert torch.equal(tokens, expected)
            assert cache.flush(60)
            assert cache.report.chunks_loaded == CHUNKS * (used > 0)
            used += 1
    assert used


@pytest.mark.parametrize("name", [*compat.CACHE_NAMES, "by position"])
def test_a_forward_by_either_name_or_by_position(name: str) -> None:
    """Without a warning: the hook hands the cache on under the name that the forward has."""
    model: Any = shared_model("llama")
    with torch.no_grad():
        expected = model(prompt(), logits_to_keep=1).logits
    store = MemoryStore()
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache, torch.no_grad():
            if name == "by position":
                logits = model(prompt(), None, None, cache, logits_to_keep=1).logits
            else:
                logits = model(prompt(), **{name: cache}, logits_to_keep=1).logits
                more = model(prompt(1, seed=9), **{name: cache}).logits  # decoding passes the hook, too
                assert more.shape[1] == 1
            assert torch.allclose(logits, expected, atol=1e-5)
            assert cache.get_seq_length() == prompt().shape[1] + (name != "by position")
            assert cache.flush(60)
    assert cache.report.chunks_loaded == CHUNKS


def test_generate_as_a_function_refuses_a_cache_by_any_name() -> None:
    model = shared_model("llama")
    for name in compat.CACHE_NAMES:
        with pytest.raises(ValueError, match="makes its own cache"):
            cake_hf.generate(model, prompt(), store=MemoryStore(), **{name: DynamicCache()})
        tokens = cake_hf.generate(model, prompt(), store=MemoryStore(), chunk_size=CHUNK, **{name: None}, **OPTIONS)
        assert torch.equal(tokens, plain_tokens())


# Models from elsewhere.


class OldNames(LlamaForCausalLM):
    """As a model that was written before the new name."""

    def forward(  # type: ignore[no-untyped-def]
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, use_cache=None,
        logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        assert not kwargs.keys() & {*compat.CACHE_NAMES}
        return super().forward(
            input_ids, attention_mask, position_ids, **given(past_key_values), inputs_embeds=inputs_embeds,
            use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip


class NeverHeardOf(LlamaForCausalLM):
    """Its name for the cache is its own; only the annotation tells."""

    def forward(  # type: ignore[no-untyped-def]
        self, input_ids=None, attention_mask=None, position_ids=None, memory: Cache | None = None, inputs_embeds=None,
        use_cache=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        assert not kwargs.keys() & {*compat.CACHE_NAMES}
        return super().forward(
            input_ids, attention_mask, position_ids, **given(memory), inputs_embeds=inputs_embeds, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip


class TakesAnything(LlamaForCausalLM):
    """Hands on whatever comes."""

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, logits_to_keep=logits_to_keep, **kwargs)


class TellsNothing(LlamaForCausalLM):
    """As above, and its signature does not even say that it keeps logits."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(*args, **kwargs)


def from_elsewhere(kind: type[LlamaForCausalLM]) -> Any:
    """The shared model's weights in a model of that class."""
    template: Any = shared_model("llama")
    torch.manual_seed(0)
    model = kind(template.config).eval()
    model.load_state_dict(template.state_dict())
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("kind", [OldNames, NeverHeardOf, TakesAnything])
def test_a_model_from_elsewhere_beside_a_new_one(kind: type[LlamaForCausalLM]) -> None:
    """Whatever its forward calls the cache. Where `generate` itself does not know the name, our hook brings it there."""
    expected = plain_tokens()
    assert_restored(twice(from_elsewhere(kind), expected))
    assert_restored(twice(shared_model("llama"), expected))


def test_a_model_without_logits_to_keep_is_computed() -> None:
    """`generate` makes no attention mask for it, and would run a restored prefix once more: so it is computed."""
    model, store = from_elsewhere(TellsNothing), MemoryStore()
    for _ in range(2):
        options = {"store": store, "chunk_size": CHUNK, "strategy": "load", "return_dict_in_generate": True, **OPTIONS}
        result = cake_hf.generate(model, prompt(), **options)
        assert torch.equal(result.sequences, plain_tokens())
        assert getattr(result, NAME).report.reason_code == "all-logits"


@pytest.mark.parametrize("way", ["closure", "partial", "wrapped"])
def test_a_forward_that_was_replaced_on_the_instance(way: str) -> None:
    """Its signature need not say anything; that of the class does. A closure hides from `generate` that logits may be few."""
    model: Any = build("llama")
    forward = model.forward
    if way == "closure":
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    elif way == "partial":
        model.forward = functools.partial(forward)
    else:
        model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    reports = twice(model, plain_tokens())
    if way == "closure":
        assert all(report.reason_code == "all-logits" for report in reports)
    else:
        assert_restored(reports)


def test_a_cache_beside_another_one_is_not_understood() -> None:
    model: Any = from_elsewhere(TakesAnything)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        model(prompt(), other=DynamicCache(), **given(cache), logits_to_keep=1)
        assert cache.report.reason == "the argument 'other' is not understood"


class FailsInPieces(LlamaForCausalLM):
    """Can be called only as a whole."""

    error: type[Exception] = TypeError
    calls: ClassVar[list[int]] = []

    def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        self.calls.append(input_ids.shape[1])
        if input_ids.shape[1] == CHUNK:
            raise self.error("one piece only")
        return super().forward(input_ids, **kwargs)

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError])
def test_what_is_not_understood_is_computed_plainly(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    model = from_elsewhere(FailsInPieces)
    model.error = error
    assert_plain(twice(model, plain_tokens()), caplog)


def test_what_is_not_understood_of_a_second_turn() -> None:
    """The cache goes back to where the first turn ended."""
    model = from_elsewhere(FailsInPieces)
    ids = prompt(3 * CHUNK + 5)
    expected = [model.generate(piece, **OPTIONS) for piece in (ids[:, : CHUNK - 2], ids)]
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        for piece, tokens in zip((ids[:, : CHUNK - 2], ids), expected, strict=True):
            assert torch.equal(model.generate(piece, **given(cache), **OPTIONS), tokens)
            cache.crop(-(cache.get_seq_length() - (CHUNK - 2)))


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt, MemoryError, ValueError])
def test_what_a_user_raises_is_theirs(error: type[BaseException]) -> None:
    """A hook, or a signal's handler: whatever it raises comes through, and the cache is as it was."""
    model: Any = build("llama")

    def interrupted(*_: object) -> None:
        raise error("mine")

    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        handle = model.model.layers[1].register_forward_pre_hook(reads_only(interrupted))
        with pytest.raises(error, match="mine"):
            model.generate(prompt(), **given(cache), **OPTIONS)
        handle.remove()
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain_tokens())


class FailsInTheLastPiece(LlamaForCausalLM):
    """Takes several tokens only as a prompt's beginning."""

    def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        if input_ids.shape[1] == TAIL:
            raise NotImplementedError("several tokens on a filled cache")
        return super().forward(input_ids, **kwargs)

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_an_error_in_the_last_piece_comes_through_once() -> None:
    """It cannot be undone any more. From then on the model's prompts are computed plainly."""
    model = from_elsewhere(FailsInTheLastPiece)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with pytest.raises(NotImplementedError):
            model.generate(prompt(), **given(cache), **OPTIONS)
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain_tokens())
        assert "several tokens on a filled cache" in cache.report.reason


def test_a_model_that_was_not_understood_is_not_tried_again() -> None:
    model = from_elsewhere(FailsInPieces)
    for turn in range(2):
        FailsInPieces.calls.clear()
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            model.generate(prompt(), **given(cache), **OPTIONS)
        assert (CHUNK in FailsInPieces.calls) == (turn == 0)
        assert "one piece only" in cache.report.reason


@pytest.mark.fault(
    "Model",
    "A prompt has token ids, or more positions, than the model's embeddings.",
    "torch's error reaches the caller; the model's other prompts are restored as before.",
)
@pytest.mark.parametrize("place", [3, CHUNK + 3, -2, slice(None)])
@pytest.mark.parametrize("is_known", [False, True])
def test_an_id_that_the_model_does_not_have_is_that_prompts_fault_alone(is_known: bool, place: int | slice) -> None:
    model: Any = build("llama")
    store, wrong = filled_store(shared_model("llama")), prompt().clone()
    wrong[0, place] = VOCABULARY
    if is_known:
        assert_loaded(model, store)
    with CakeCache(model, store, chunk_size=CHUNK) as cache, pytest.raises(IndexError):
        cache.prefill(wrong)
    with CakeCache(model, store, chunk_size=CHUNK) as cache, pytest.raises(IndexError):
        model.generate(wrong, **given(cache), **OPTIONS)
    assert_loaded(model, store)


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_cache_that_met_such_an_id_restores_its_next_prompt(is_reset: bool, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build("llama")
    store, wrong = filled_store(shared_model("llama")), prompt().clone()
    wrong[0, 3] = VOCABULARY
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        with pytest.raises(IndexError):
            model.generate(wrong, **given(cache), **OPTIONS)
        assert "This prompt is computed plainly" in caplog.text
        copied = copy.deepcopy(cache)
        for each in (cache, copied):
            if is_reset:
                each.reset()
            assert torch.equal(model.generate(prompt(), **given(each), **OPTIONS), plain_tokens())
            assert each.report.chunks_loaded == CHUNKS


def test_a_cache_whose_prompt_met_a_passing_error_restores_again_after_reset() -> None:
    model = from_elsewhere(FailsInPieces)
    model.error = RuntimeError
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain_tokens())
        assert "one piece only" in cache.report.reason
        FailsInPieces.calls.clear()
        copied = copy.deepcopy(cache)
        for each in (cache, copied):
            each.reset()
            assert torch.equal(model.generate(prompt(), **given(each), **OPTIONS), plain_tokens())
        assert FailsInPieces.calls.count(CHUNK) == 2  # each tries again


def test_an_error_that_a_users_hook_causes_in_torch_is_theirs() -> None:
    model: Any = build("llama")
    wrong = torch.nn.Linear(3, 3)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: wrong(torch.ones(2)))
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
            model.generate(prompt(), **given(cache), **OPTIONS)
        handle.remove()
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain_tokens())


def test_a_forward_called_by_itself_is_a_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    """No hook runs then. It is our own model, so its KV is welcome."""
    model: Any = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        logits = model.forward(prompt(), **given(cache)).logits
        step = model.forward(prompt(1, seed=9), **given(cache)).logits
        assert cache.report.reason_code == "called-directly"
        assert cache.flush(60)
        assert list(cache.store.keys()) == []
        used = DynamicCache(config=model.config)
        assert torch.equal(logits, model(prompt(), **given(used)).logits)
        assert torch.equal(step, model(prompt(1, seed=9), **given(used)).logits)
    assert len([record for record in caplog.records if record.name == "cake_hf"]) == 1


# Canaries: what the next release may change.


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if the installed version were newer than all that were tested."""
    monkeypatch.setattr("transformers.__version__", "99.0")
    return monkeypatch


def test_an_untested_version_is_tried_once_and_serves(
    untested: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, model = plain_tokens(), build("llama")
    assert_restored(twice(model, expected))
    lines = [record.message for record in caplog.records if record.name == "cake_hf"]
    assert len(lines) == 1, lines
    assert "transformers 99.0 is newer than" in lines[0]
    assert "restored correctly" in lines[0]


def test_a_model_in_training_mode_cannot_be_tried(untested: pytest.MonkeyPatch) -> None:
    model: Any = build("llama").train()
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        model.eval()
        assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain_tokens())
        assert "training mode" in cache.report.reason
    assert_restored(twice(model, plain_tokens()))


def test_a_trial_in_which_nothing_was_restored_says_nothing(
    untested: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither that prompts can be restored nor that they cannot; the next cache tries again."""
    expected, model = plain_tokens(), build("llama")
    with untested.context() as patch:
        patch.setattr(selfcheck.RestoringCache, "_refusal", lambda self, call: Refusal("test", "for a test"))
        CakeCache(model, MemoryStore(), chunk_size=CHUNK).close()
    assert not [record for record in caplog.records if record.name == "cake_hf"]
    assert_restored(twice(model, expected))


def test_a_trial_whose_chunks_are_not_saved_fails(untested: pytest.MonkeyPatch) -> None:
    model = build("llama")
    with untested.context() as patch:
        patch.setattr(MemoryStore, "write", lambda self, *args, **kwargs: True)
        cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
        assert "0 of 3 chunks were loaded" in cache._model_refusal.text
        cache.close()


def test_a_model_that_is_always_computed_makes_no_alarm(
    untested: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It forgets its state where a prompt is cut, on every version, and its report says so."""
    for family in ("jamba", "mamba2"):
        model: Any = family_model(family)
        if not support._takes_cache(model) or not compat.takes_dynamic_cache(model):
            continue  # older versions have another cache for it, and ours is refused
        plain = model.generate(prompt(), **OPTIONS)
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            assert torch.equal(model.generate(prompt(), **given(cache), **OPTIONS), plain)
            assert re.search(
                "forgets its recurrent state|keeps no attention|cannot be restored yet", cache.report.reason
            )
    assert not [record for record in caplog.records if record.name == "cake_hf"]


def test_canary_another_rounding(untested: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The negative control of the trial: a version on which what we restore is not what chunks give."""
    expected, model = plain_tokens(), build("llama")
    show = selfcheck.RestoringCache._as_kept
    untested.setattr(
        selfcheck.RestoringCache,
        "_as_kept",
        lambda self, layer, keys, values: show(self, layer, keys * 1.001, values),
    )
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert "other logits" in cache._model_refusal.text
    untested.undo()
    untested.setattr("transformers.__version__", "99.0")
    assert_plain(twice(model, expected), caplog)


@dataclass
class RenamedOutput(ModelOutput):
    """Nothing in it is called as it was."""

    logits: torch.Tensor | None = None
    memory: Any = None


class RenamedArgument(LlamaForCausalLM):
    """Its forward has another name for the cache, and so has what it gives back."""

    def forward(self, input_ids=None, kv_memory: Cache | None = None, logits_to_keep=0, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids, **given(kv_memory), logits_to_keep=logits_to_keep, **kwargs)
        return RenamedOutput(output.logits, kv_memory)


def test_canary_another_argument_and_another_field(untested: pytest.MonkeyPatch) -> None:
    assert_restored(twice(from_elsewhere(RenamedArgument), plain_tokens()))


def test_canary_generate_has_another_argument(untested: pytest.MonkeyPatch) -> None:
    """What `generate` calls the cache is read off what it hands to `prepare_inputs_for_generation`."""
    expected, store = plain_tokens(), MemoryStore()
    prepare, generate = GenerationMixin.prepare_inputs_for_generation, GenerationMixin.generate

    def new_prepare(self: Any, input_ids: Any, kv_memory: Cache | None = None, **kwargs: Any) -> Any:
        return prepare(self, input_ids, **kwargs)

    def new_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert NAME not in kwargs
        return generate(self, *args, **given(kwargs.pop("kv_memory")), **kwargs)

    untested.setattr(GenerationMixin, "prepare_inputs_for_generation", new_prepare)
    untested.setattr(GenerationMixin, "generate", new_generate)
    options = {"store": store, "chunk_size": CHUNK, "strategy": "load", "return_dict_in_generate": True, **OPTIONS}
    for loaded in (0, CHUNKS):
        result = cake_hf.generate(build("llama"), prompt(), **options)
        assert torch.equal(result.sequences, expected)
        assert getattr(result, NAME).report.chunks_loaded == loaded


class NoCacheInOutput(LlamaForCausalLM):
    """The field for the cache is gone."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return CausalLMOutput(logits=super().forward(*args, **kwargs).logits)

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_canary_no_cache_in_the_output(untested: pytest.MonkeyPatch) -> None:
    assert_restored(twice(from_elsewhere(NoCacheInOutput), plain_tokens()))


def test_canary_update_with_new_arguments(untested: pytest.MonkeyPatch) -> None:
    """Attention hands more to the cache, and that hands it on to its layers."""
    expected, model = plain_tokens(), build("llama")
    source = textwrap.dedent(inspect.getsource(modeling_llama.LlamaAttention.forward))
    source = source[source.index("def forward") :]
    changed = re.sub(r"(\.update\([^)]*)\)", r"\1, step=torch.ones(1))", source)
    assert changed != source
    scope = dict(vars(modeling_llama))
    exec(changed, scope)
    untested.setattr(modeling_llama.LlamaAttention, "forward", scope["forward"])
    layer_update = cache_utils.DynamicLayer.update

    steps: list[Any] = []

    def update(self: Any, keys: Any, values: Any, index: int, *args: Any, step: Any = None, **kwargs: Any) -> Any:
        return self.layers[index].update(keys, values, *args, step=step, **kwargs)

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs.get("step"))
        return own_update(self, *args, **kwargs)

    own_update = TokenMajorLayer.update
    untested.setattr(TokenMajorLayer, "update", seen)
    untested.setattr(Cache, "update", update)
    untested.setattr(
        cache_utils.DynamicLayer, "update", lambda self, k, v, *a, step=None, **kw: layer_update(self, k, v)
    )
    assert_restored(twice(model, expected))
    assert any(step is not None for step in steps)


def test_canary_layers_keep_their_tensors_elsewhere(
    untested: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`keys` and `values` are gone: our layers are of no use then, and transformers' own are taken."""
    expected, model = plain_tokens(), build("llama")
    layer = cache_utils.DynamicLayer

    def begin(self: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.device = keys.device
        self.k, self.v = keys[..., :0, :], values[..., :0, :]
        self.is_initialized = True

    def update(self: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.k, self.v = torch.cat([self.k, keys], -2), torch.cat([self.v, values], -2)
        return self.k, self.v

    untested.setattr(layer, "lazy_initialization", begin)
    untested.setattr(layer, "update", update)
    untested.setattr(layer, "get_seq_length", lambda self: self.k.shape[-2] if self.is_initialized else 0)
    assert_plain(twice(model, expected), caplog)


def test_canary_update_gives_a_third_value(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also if the version number does not say that anything is new: layers are compared each time a cache is made."""
    expected, model = plain_tokens(), build("llama")
    source = textwrap.dedent(inspect.getsource(modeling_llama.LlamaAttention.forward))
    source = source[source.index("def forward") :]
    changed = source.replace("key_states, value_states = ", "key_states, value_states, _ = ")
    assert changed != source
    scope = dict(vars(modeling_llama))
    exec(changed, scope)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", scope["forward"])
    layer_update = cache_utils.DynamicLayer.update
    monkeypatch.setattr(
        cache_utils.DynamicLayer, "update", lambda *args, **kwargs: (*layer_update(*args, **kwargs), None)
    )

    def update(self: Any, keys: Any, values: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        return self.layers[index].update(keys, values)

    monkeypatch.setattr(Cache, "update", update)
    assert_plain(twice(model, expected), caplog)


def test_canary_layers_are_no_list(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected, model = plain_tokens(), build("llama")
    real = DynamicCache.__init__

    class Layers(dict):  # type: ignore[type-arg]
        """By number, and walked through as a list is."""

        def __iter__(self) -> Iterator[Any]:
            return iter(self.values())

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.layers = Layers(enumerate(self.layers))

    monkeypatch.setattr(DynamicCache, "__init__", begin)
    assert_plain(twice(model, expected), caplog)


def test_canary_a_cache_asks_for_a_layer_to_say_its_length(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers itself gives it."""
    expected, model = plain_tokens(), build("llama")
    real = Cache.get_seq_length

    def length(self: Any, *layer: int, **named: int) -> int:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "get_seq_length" and caller.f_back is not None:  # ours hands on what it is given
            caller = caller.f_back
        if not (layer or named) and not str(caller.f_globals["__name__"]).startswith("transformers"):
            raise TypeError("which layer?")
        return int(real(self, *layer, **named))

    monkeypatch.setattr(Cache, "get_seq_length", length)
    assert_plain(twice(model, expected), caplog)


def test_canary_a_config_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = plain_tokens(), build("llama")
    real = DynamicCache.__init__
    monkeypatch.setattr(DynamicCache, "__init__", lambda self, config: real(self, config=config))
    assert_restored(twice(model, expected))


class TwiceInTheCache(LlamaForCausalLM):
    """Brings each token's KV to the cache two times, as some models do."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(*args, **kwargs)
        for number, layer in enumerate(kwargs[NAME].layers):
            new = kwargs.get("input_ids", args[0] if args else None).shape[1]
            kwargs[NAME].update(layer.keys[..., -new:, :].clone(), layer.values[..., -new:, :].clone(), number)
        return output

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_a_model_that_keeps_tokens_twice_is_computed() -> None:
    model: Any = from_elsewhere(TwiceInTheCache)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        logits = model(input_ids=prompt(), **given(cache), logits_to_keep=1).logits
        assert cache.report.reason_code == "token-count"
        plain = model(input_ids=prompt(), **given(DynamicCache(config=model.config)), logits_to_keep=1).logits
        assert torch.equal(logits, plain)


class OtherwiseInPieces(LlamaForCausalLM):
    """Sees nothing of what was before a forward of several tokens, whatever the cache holds."""

    def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        if input_ids.shape[1] > 1:
            kwargs = {**kwargs, **given(None), "use_cache": False, "attention_mask": None, "position_ids": None}
            return super().forward(input_ids, **kwargs)
        return super().forward(input_ids, **kwargs)

    forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def test_a_model_from_elsewhere_that_cannot_be_cut_is_computed() -> None:
    model: Any = from_elsewhere(OtherwiseInPieces)
    with torch.no_grad():
        plain = model(input_ids=prompt(), logits_to_keep=1).logits
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            assert torch.equal(model(input_ids=prompt(), **given(cache), logits_to_keep=1).logits, plain)
            assert cache.report.reason


@pytest.mark.parametrize("tested", [True, False])
def test_canary_a_cache_takes_no_config(
    tested: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, model = plain_tokens(), build("llama")
    if not tested:
        monkeypatch.setattr("transformers.__version__", "99.0")
    real = DynamicCache.__init__

    def begin(self: Any, *, layout: Any = None) -> None:
        real(self)

    monkeypatch.setattr(DynamicCache, "__init__", begin)
    assert_plain(twice(model, expected), caplog)


# What is said, and what is installed.


def test_a_version_below_the_floor_is_refused_in_one_sentence() -> None:
    code = """
import transformers
transformers.__version__ = "4.57.6"
try:
    from cake_hf import CakeCache
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=280)
    assert done.stdout == (
        "cake_hf needs transformers 5.0 or newer, and 4.57.6 is installed: pip install 'transformers>=5.0,<6'\n"
    )


def test_the_versions_in_the_project_are_those_in_the_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={compat.OLDEST},<6" in project["dependencies"]
    pins = {name: (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8") for name in ("locked", "oldest")}
    assert f"\ntransformers=={compat.NEWEST_TESTED}\n" in pins["locked"]
    assert f"\ntransformers=={compat.OLDEST}.0\n" in pins["oldest"]
    for text in pins.values():
        assert all(re.match(r"[\w.-]+==\S+( ;.*)?$", line) for line in text.splitlines() if not line.startswith("#"))
        assert "://" not in text


def test_our_calls_raise_no_future_warning(recwarn: pytest.WarningsRecorder) -> None:
    twice(build("llama"), plain_tokens())
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_of_one_version_are_read_on_the_others(version: str) -> None:
    """With exact=False. They were written once, by the oldest and a new version, and are kept with the tests."""
    with portable_cache(kept_chunks(version), strategy="load") as cache:
        restored = run(cache._session.model, IDS, cache)
        assert cache.report.chunks_loaded == 2, cache.report
    for seed in (0, 1):
        with portable_cache(kept_chunks(version), seed=seed, strategy="compute", save=False) as cache:
            computed = run(cache._session.model, IDS, cache)
            pairs = zip(restored.keys + restored.values, computed.keys + computed.values, strict=True)
            assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs) == (seed == 0)
    assert torch.equal(restored.tokens, run(build("llama"), IDS, DynamicCache(config=build("llama").config)).tokens)


def test_exact_chunks_of_one_version_are_not_found_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
        assert cache.flush(60)
    monkeypatch.setattr("transformers.__version__", "5.1.99")
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        assert cache.prefill(prompt()).chunks_missed == CHUNKS
