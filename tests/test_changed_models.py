"""What computes is what is keyed: a changed model never gets the plain model's KV, nor leaves its own in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cake_hf
from cake_hf import CakeCache, MemoryStore, Report
from cake_hf.keys import chunk_keys
from late_copies import late_copies
from models import CHUNK, CHUNKS, NEW_TOKENS, Outcome, build, difference, oracle, prompt, run
from naming import given

Change = Callable[[Any], AbstractContextManager[None]]
IDS = prompt()


def direction(seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(64, generator=torch.Generator().manual_seed(seed))


def answer(model: Any, store: MemoryStore, **options: Any) -> tuple[Outcome, Report]:
    with CakeCache(model, store, chunk_size=CHUNK, **{"strategy": "load", **options}) as cache:
        outcome = run(model, IDS, cache)
        cache.flush()
        return outcome, cache.report


@contextmanager
def hooked(register: Callable[[Any], Any]) -> Iterator[None]:
    handle = register(None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something in the place of an attribute; afterwards it is as it was, also where the attribute was the class's."""
    own = name in vars(owner) or name in vars(owner).get("_modules", {})
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def steering_hook(model: Any) -> AbstractContextManager[None]:
    return hooked(
        lambda _: model.model.layers[1].register_forward_hook(lambda module, args, output: output + direction())
    )


def steering_of_prompts_only(model: Any) -> AbstractContextManager[None]:
    def steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + direction() if output.shape[1] > CHUNK // 2 else output

    return hooked(lambda _: model.model.layers[1].register_forward_hook(steer))


def pre_hook(model: Any) -> AbstractContextManager[None]:
    return hooked(
        lambda _: model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    )


def hook_on_all_modules(model: Any) -> AbstractContextManager[None]:
    def steer(module: Any, args: Any, output: Any) -> Any:
        return output + direction() if module is model.model.layers[1] else None

    return hooked(lambda _: torch.nn.modules.module.register_module_forward_hook(steer))


def forward_of_one_module(model: Any) -> AbstractContextManager[None]:
    mlp = model.model.layers[0].mlp
    return replaced(mlp, "forward", lambda x: type(mlp).forward(mlp, x) * 3)


def wrapped_forward(model: Any) -> AbstractContextManager[None]:
    """It claims, as `functools.wraps` has it, to be the class's own; it does something to long inputs only."""
    layer = model.model.layers[1]
    real = layer.forward

    @functools.wraps(real)
    def forward(hidden: torch.Tensor, **kwargs: Any) -> Any:
        return real(hidden, **kwargs) + (direction() if hidden.shape[1] > 10 else 0)

    return replaced(layer, "forward", forward)


def method_of_the_class(model: Any) -> AbstractContextManager[None]:
    kind = type(model.model.norm)
    real = kind.forward
    return replaced(kind, "forward", lambda self, x: real(self, x) * (2 if x.shape[1] > 10 else 1))


def function_of_the_file(model: Any) -> AbstractContextManager[None]:
    import transformers.models.llama.modeling_llama as home

    real = home.apply_rotary_pos_emb

    def rotate(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = real(q, k, *args, **kwargs)
        return q, k * (2 if k.shape[2] > 10 else 1)

    return replaced(home, "apply_rotary_pos_emb", rotate)


def plain_attribute(model: Any) -> AbstractContextManager[None]:
    return replaced(model.model.layers[1].self_attn, "scaling", 0.9)


def attribute_that_shows_late(model: Any) -> AbstractContextManager[None]:
    return replaced(model.model.layers[1].self_attn, "sliding_window", 4 * CHUNK)


@contextmanager
def edited_buffer(model: Any) -> Iterator[None]:
    frequencies = model.model.rotary_emb.inv_freq
    before = frequencies.clone()
    frequencies[-1] *= 1.5
    yield
    frequencies.copy_(before)


@contextmanager
def kernel_under_its_name(model: Any) -> Iterator[None]:
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = real(module, query, *args, **kwargs)
        return output * (2 if query.shape[2] > 10 else 1), weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def module_in_training_mode(model: Any) -> Iterator[None]:
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.5
    attention.train()
    yield
    attention.attention_dropout = 0.0
    attention.eval()


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.nn.functional.silu else result


def torch_mode(model: Any) -> AbstractContextManager[Any]:
    return Doubling()


class Scaled(torch.nn.Module):
    """A module in the place of another one, with a tensor of its own that is no parameter."""

    def __init__(self, inner: Any, by: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.by = (by,)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(hidden)
        return output + self.by[0]


def module_in_between(model: Any) -> AbstractContextManager[None]:
    layer = model.model.layers[0]
    return replaced(layer, "mlp", Scaled(layer.mlp, direction(1)).eval())


@contextmanager
def weight_edited_behind_torchs_back(model: Any) -> Iterator[None]:
    row = model.model.layers[0].mlp.down_proj.weight.data[5]
    before = row.clone()
    row.numpy()[:] *= 3
    yield
    row.copy_(before)


@contextmanager
def embedding_of_one_token(model: Any) -> Iterator[None]:
    row = model.model.embed_tokens.weight.data[int(IDS[0, 3])]
    before = row.clone()
    row *= 3
    yield
    row.copy_(before)


CHANGES: list[Change] = [
    steering_hook,
    steering_of_prompts_only,
    pre_hook,
    hook_on_all_modules,
    forward_of_one_module,
    wrapped_forward,
    method_of_the_class,
    function_of_the_file,
    plain_attribute,
    edited_buffer,
    kernel_under_its_name,
    torch_mode,
    module_in_between,
    weight_edited_behind_torchs_back,
    embedding_of_one_token,
]


@pytest.mark.fault(
    "Model",
    "A model is steered, patched or edited (hooks, forwards, functions, attributes, buffers, kernels, modes, hidden edits).",
    "Its KV gets keys of its own, or its prompts are computed plainly; the plain model's chunks are neither used nor replaced.",
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("changed_first", [False, True], ids=["plain first", "changed first"])
def test_a_changed_model_and_the_plain_one_share_nothing(change: Change, changed_first: bool) -> None:
    model, store = build("llama"), MemoryStore()
    plain = oracle(model, IDS)
    with change(model):
        changed = oracle(model, IDS)
        # Where it is computed plainly, that is in one piece.
        answers = [changed.tokens, run(model, IDS, DynamicCache(config=model.config)).tokens]  # type: ignore[arg-type]
    assert difference(plain, changed), "the change changes nothing: no test of anything"
    for turn in (changed_first, not changed_first, changed_first):
        with change(model) if turn else nullcontext():
            outcome, _ = answer(model, store)
        assert any(torch.equal(outcome.tokens, tokens) for tokens in (answers if turn else [plain.tokens]))
    outcome, report = answer(model, store)
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, plain) == ""


@pytest.mark.parametrize("change", [plain_attribute, function_of_the_file, edited_buffer, module_in_between])
def test_what_can_be_told_apart_is_still_restored(change: Change) -> None:
    model, store = build("llama"), MemoryStore()
    with change(model):
        answer(model, store)
        outcome, report = answer(model, store)
        assert report.chunks_loaded == CHUNKS
        assert difference(outcome, oracle(model, IDS)) == ""


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_with_exact_off_a_model_that_is_changed_later_is_told_apart(change: Change) -> None:
    model, store = build("llama"), MemoryStore()
    plain = answer(model, store, exact=False)[0]
    with change(model):
        answers = [oracle(model, IDS).tokens, run(model, IDS, DynamicCache(config=model.config)).tokens]  # type: ignore[arg-type]
        for _ in range(2):
            outcome, _ = answer(model, store, exact=False)
            assert any(torch.equal(outcome.tokens, tokens) for tokens in answers)
    outcome, report = answer(model, store, exact=False)
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, plain) == ""


def test_a_model_that_is_changed_to_look_ahead_is_tried_again() -> None:
    model, store = build("llama"), MemoryStore()
    layers: Any = model.model.layers  # type: ignore[union-attr]
    answer(model, store)
    for layer in layers:
        layer.self_attn.is_causal = False
    assert answer(model, store)[1].reason_code == "looks-ahead"
    for layer in layers:
        layer.self_attn.is_causal = True
    assert answer(model, store)[1].chunks_loaded == CHUNKS


def test_an_attribute_that_shows_only_in_long_prompts_is_among_the_keys() -> None:
    """Nothing of it is seen by a short forward."""
    model, store = build("llama"), MemoryStore()
    answer(model, store)
    with attribute_that_shows_late(model):
        assert answer(model, store)[1].chunks_loaded == 0
    assert answer(model, store)[1].chunks_loaded == CHUNKS


@pytest.mark.fault(
    "Model",
    "A part of the model is left in training mode, or computes otherwise each time.",
    "Its prompts are computed plainly; the report says which part.",
)
def test_a_part_in_training_mode() -> None:
    model, store = build("llama"), MemoryStore()
    answer(model, store)
    with module_in_training_mode(model):
        _, report = answer(model, store)
        assert report.reason_code == "part-in-training"
        assert "layers.0.self_attn" in report.reason
        assert report.chunks_loaded == report.chunks_saved == 0
    assert answer(model, store)[1].chunks_loaded == CHUNKS


def test_a_model_that_computes_otherwise_each_time() -> None:
    model, store = build("llama"), MemoryStore()
    answer(model, store)
    mlp: Any = model.model.layers[0].mlp  # type: ignore[union-attr, index]

    class Noisy(type(mlp)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = super().forward(hidden)
            return output + torch.randn_like(output)

    mlp.__class__ = Noisy
    _, report = answer(model, store)
    assert report.reason_code == "not-deterministic"
    assert report.chunks_saved == 0


def filled_by_another(model: Any) -> MemoryStore:
    """A store in which chunks of a changed model lie under the plain model's keys, as older versions left them."""
    store = MemoryStore()
    with pytest.MonkeyPatch.context() as patch, plain_attribute(model):
        make_blind(patch)
        answer(model, store)
    return store


def make_blind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cake_hf.restore.bound_model.behaviour_digest", lambda seen: "")
    patch.setattr("cake_hf.restore.bound_model.code_digest", lambda model, chosen: "")


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the comparison with what is stored can tell changed models apart."""
    make_blind(monkeypatch)


@pytest.mark.fault(
    "Model",
    "The store holds, under a model's keys, KV that the model does not compute.",
    "A restore that computes some of it notices, loads and saves nothing, says so once, and the prompt is computed plainly.",
)
@pytest.mark.usefixtures("blind")
def test_what_is_computed_although_it_is_stored_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    store = filled_by_another(model)
    expected = oracle(model, IDS)
    for _ in range(2):
        outcome, report = answer(model, store, strategy="compute")
        assert "does not compute what the store holds (chunk 0 " in report.reason
        assert report.chunks_saved == report.chunks_loaded == 0
        assert torch.equal(outcome.tokens, expected.tokens)
    assert sum("does not compute what the store holds" in record.message for record in caplog.records) == 1


@pytest.mark.usefixtures("blind")
def test_nothing_is_saved_before_the_comparison() -> None:
    """The first chunk is stored and wrong, the others are new."""
    model = build("llama")
    store = filled_by_another(model)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        first, *others = chunk_keys(cache._session.bound_model.namespace(), IDS[0].tolist(), CHUNK)
    for key in others:
        store.delete(key)
    before = list(store.keys())
    assert before == [first]
    _, report = answer(model, store, strategy="compute")
    assert report.chunks_saved == 0
    assert list(store.keys()) == before


@pytest.mark.usefixtures("blind")
def test_a_good_store_passes_the_comparison() -> None:
    """The negative control of the two above."""
    model, store = build("llama"), MemoryStore()
    answer(model, store)
    outcome, report = answer(model, store, strategy="compute")
    assert (report.reason, report.chunks_computed) == ("", CHUNKS)
    assert difference(outcome, oracle(model, IDS)) == ""


def test_the_comparison_makes_no_forward_wait_for_a_copy_from_the_gpu() -> None:
    model, store = build("llama"), MemoryStore()
    answer(model, store)
    with late_copies() as copies:
        outcome, report = answer(model, store, strategy="compute")
    assert copies.awaited_by == {"cake-load-header"}
    assert (report.chunks_computed, report.chunks_missed) == (CHUNKS, 0)
    assert difference(outcome, oracle(model, IDS)) == ""


def test_a_marked_hook_stays_and_sees_what_is_computed() -> None:
    model, store = build("llama"), MemoryStore()
    seen: list[int] = []
    hook = cake_hf.reads_only(lambda module, args, output: seen.append(output.shape[1]))
    handle = model.model.layers[1].register_forward_hook(hook)  # type: ignore[union-attr, index, operator]
    answer(model, store)
    assert seen[: CHUNKS + 1] == [CHUNK] * CHUNKS + [IDS.shape[1] - CHUNK * CHUNKS]
    seen.clear()
    outcome, report = answer(model, store)
    assert report.chunks_loaded == CHUNKS
    assert seen[0] == IDS.shape[1] - CHUNK * CHUNKS
    handle.remove()
    assert difference(outcome, oracle(model, IDS)) == ""


def test_what_a_marked_hook_returns_is_ignored() -> None:
    model, store = build("llama"), MemoryStore()
    expected = oracle(model, IDS)
    hook = cake_hf.reads_only(lambda module, args, output: output * 0)
    model.model.layers[1].register_forward_hook(hook)  # type: ignore[union-attr, index, operator]
    assert difference(answer(model, store)[0], expected) == ""


def drop_a_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:-1]


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def cast_in_part(model: Any) -> None:
    """K and V of one layer are kept in another dtype."""
    attention = model.model.layers[1].self_attn
    attention.k_proj.forward = lambda x: torch.nn.functional.linear(x, attention.k_proj.weight).double()
    attention.v_proj.forward = lambda x: torch.nn.functional.linear(x, attention.v_proj.weight).double()
    attention.o_proj.forward = lambda x: torch.nn.functional.linear(x.float(), attention.o_proj.weight)
    attention.q_proj.forward = lambda x: torch.nn.functional.linear(x, attention.q_proj.weight).double()


@pytest.mark.fault(
    "Model",
    "A layer is dropped, or cast to another dtype, after the model was first used with a cache.",
    "The layout of its KV is found out anew, and its prompts are restored as before.",
)
@pytest.mark.parametrize("change", [drop_a_layer, cast, cast_in_part], ids=lambda change: change.__name__)
def test_a_layer_that_was_cast_or_dropped_after_first_use(change: Callable[[Any], None]) -> None:
    model, store = build("llama"), MemoryStore()
    answer(model, store)
    change(model)
    plain: Any = model.generate  # type: ignore[operator]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = plain(IDS, prefill_chunk_size=CHUNK, **options)
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            assert torch.equal(plain(IDS, **given(cache), **options), expected)
            assert cache.report.chunks_loaded == turn * CHUNKS
