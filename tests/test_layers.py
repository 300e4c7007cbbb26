"""A `CakeCache` behaves as a `DynamicCache` under every operation that generation, or a user, applies to it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from cake_hf.layers import HEADROOM_TOKENS, TokenMajorLayer
from cake_hf.layers.compat import drop_content
from device_marks import devices
from naming import mask_sizes

HEADS, KEY_DIM, VALUE_DIM = 2, 8, 6
Operation = Callable[[Any], None]


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, HEADS, tokens, KEY_DIM, generator=generator),
        torch.randn(batch, HEADS, tokens, VALUE_DIM, generator=generator),
    )


def assert_equal(ours: TokenMajorLayer, theirs: DynamicLayer) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert mask_sizes(ours, 3) == mask_sizes(theirs, 3)
    if theirs.get_seq_length():
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


operations = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(0, 50)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("select"), st.integers(0, 5)),
    st.tuples(st.just("deepcopy"), st.just(0)),
    st.tuples(st.just("replace"), st.integers(1, 5)),
    st.tuples(st.just("reserve"), st.integers(1, 600)),
    st.tuples(st.just("reserve by head"), st.integers(1, 600)),
    st.tuples(st.just("lay by head"), st.just(0)),
)


@settings(max_examples=200)
@given(st.lists(operations, max_size=14))
def test_same_content_after_any_operations(steps: list[tuple[str, int]]) -> None:
    ours, theirs, batch = TokenMajorLayer(), DynamicLayer(), 2
    for seed, (name, number) in enumerate(steps):
        length = theirs.get_seq_length()
        if name == "update":
            new = states(batch, number, seed)
            for one, other in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert torch.equal(one, other)
        elif name == "crop" and length:
            number = min(number, length)  # of more, older versions leave some
            ours.crop(-number)
            theirs.crop(-number)
        elif name == "reset":
            ours.reset()
            drop_content(theirs)
            theirs.reset()
            batch = 2
        elif name == "reorder" and length:
            order = torch.tensor([(number + row) % batch for row in range(batch)])
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
        elif name == "repeat" and length and batch * number < 13:
            ours.batch_repeat_interleave(number)
            theirs.batch_repeat_interleave(number)
            batch *= number
        elif name == "select" and length:
            rows = torch.tensor([number % batch])
            ours.batch_select_indices(rows)
            theirs.batch_select_indices(rows)
            batch = 1
        elif name == "deepcopy":
            old, ours = ours, copy.deepcopy(ours)
            if length:
                old.update(*states(batch, 3, seed))  # must not show in the copy
        elif name == "replace" and length:
            for layer in (ours, theirs):  # what a KV compression method does
                layer.keys = layer.keys[:, :, ::number].clone()
                layer.values = layer.values[:, :, ::number].clone()
        elif name == "reserve" and length:
            ours.reserve(*states(1, 1, 0), number)
            assert all(buffer[:1].is_contiguous() for buffer in ours.buffers)
        elif name == "reserve by head" and length:
            ours.reserve(*states(1, 1, 0), number, head_major=True)
            assert all(buffer.shape[1] >= number for buffer in ours.buffers)
        elif name == "lay by head":
            ours.make_head_major()
        assert_equal(ours, theirs)


def test_crop_takes_a_length_as_dynamic_layer_does() -> None:
    """Refused, in the newest versions of transformers."""
    outcomes = []
    for layer in (TokenMajorLayer(), DynamicLayer()):
        layer.update(*states(1, 5, 0))
        try:
            layer.crop(3)
        except ValueError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(str(layer.update(*states(1, 1, 1))[0].shape[-2]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == "4" or "negative" in outcomes[0]


def test_appending_copies_only_the_new_tokens() -> None:
    layer = TokenMajorLayer()
    layer.update(*states(1, 10, 0))
    before = layer.buffers[0].data_ptr()
    for seed in range(100):
        layer.update(*states(1, 1, seed))
    assert layer.buffers[0].data_ptr() == before


def test_a_chunk_of_tokens_is_one_piece_of_memory() -> None:
    layer = TokenMajorLayer()
    layer.update(*states(1, 64, 0))
    assert all(buffer[:, 16:32].is_contiguous() for buffer in layer.buffers)
    assert layer.keys.transpose(1, 2).is_contiguous()


def test_how_attention_sees_tokens_does_not_tell_how_much_room_there_is() -> None:
    """Of a single row. Kernels that keep a plan for each shape and stride would make one for each capacity."""
    tight, roomy = TokenMajorLayer(), TokenMajorLayer()
    for layer, capacity in ((tight, 1), (roomy, 500)):
        layer.reserve(*states(1, 1, 0), capacity)
        layer.update(*states(1, 64, 0))
        layer.update(*states(1, 3, 1))
    assert tight.buffers[0].stride() != roomy.buffers[0].stride()
    for one, other in ((tight.keys, roomy.keys), (tight.values, roomy.values)):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "tokens"), [(512, 512), (1, 512), (1, 4161), (1, 32833)])
def test_attention_gives_the_same_bits_however_kv_lies(
    queries: int, tokens: int, dtype: torch.dtype, device: str
) -> None:
    """What all exactness rests on where attention is handed KV as it lies: in the first chunk, and while decoding."""
    torch.manual_seed(0)
    query = torch.randn(1, 8, queries, 64).to(device, dtype)
    plain = [torch.randn(1, 2, tokens, 64).to(device, dtype) for _ in range(2)]
    outcomes = []
    for head_major in (None, True, False):
        keys, values = plain
        if head_major is not None:
            layer = TokenMajorLayer()
            layer.reserve(keys[:, :, :0], values[:, :, :0], tokens + 100, head_major=head_major)
            keys, values = layer.update(keys, values)
        attended = scaled_dot_product_attention(query, keys, values, is_causal=queries > 1, enable_gqa=True)
        outcomes.append(attended.cpu())
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_while_decoding_the_tokens_of_a_head_are_one_piece_of_memory() -> None:
    layer = TokenMajorLayer()
    layer.make_head_major()
    assert not layer.is_initialized
    layer.update(*states(1, 64, 0))
    layer.make_head_major()
    before = layer.buffers[0].data_ptr()
    for seed in range(HEADROOM_TOKENS):
        layer.update(*states(1, 1, seed))
        layer.make_head_major()
    assert layer.buffers[0].data_ptr() == before
    for seed in range(2 * HEADROOM_TOKENS):  # beyond the room that there was
        layer.update(*states(1, 1, seed))
    assert all(kept[0, head].is_contiguous() for kept in (layer.keys, layer.values) for head in range(HEADS))
    layer.reserve(*states(1, 1, 0), 1)
    assert all(buffer.is_contiguous() for buffer in layer.buffers)


def test_room_for_what_is_only_computed_lies_by_head() -> None:
    layer = TokenMajorLayer()
    layer.reserve(*states(1, 1, 0), 100, head_major=True)
    before = [buffer.data_ptr() for buffer in layer.buffers]
    layer.update(*states(1, 64, 0))
    assert all(kept[0, head].is_contiguous() for kept in (layer.keys, layer.values) for head in range(HEADS))
    layer.make_head_major()
    layer.reserve(*states(1, 1, 0), 90, head_major=True)
    assert [buffer.data_ptr() for buffer in layer.buffers] == before


def test_one_head_lies_by_token_in_any_case() -> None:
    """Both orders are the same then; loads want to hear that it is theirs."""
    layer = TokenMajorLayer()
    layer.reserve(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 6), 100, head_major=True)
    assert all(buffer.is_contiguous() for buffer in layer.buffers)


def test_memory_that_lies_by_head_stays_so_when_rows_change() -> None:
    """Beams are reordered with each token; to lay them anew each time would take a second copy of all KV."""
    layer = TokenMajorLayer()
    layer.update(*states(2, 64, 0))
    layer.make_head_major()
    for change in (
        lambda: layer.reorder_cache(torch.tensor([1, 1])),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.batch_select_indices(torch.tensor([3, 0])),
    ):
        change()
        before = layer.buffers[0].data_ptr()
        layer.make_head_major()
        layer.update(*states(layer.keys.shape[0], 1, 1))
        assert layer.buffers[0].data_ptr() == before
        assert layer.keys[0, 0].is_contiguous()


def test_laying_by_head_leaves_room_for_tokens() -> None:
    layer = TokenMajorLayer()
    layer.update(*states(1, 64, 0))
    layer = copy.deepcopy(layer)  # as small as can be
    layer.make_head_major()
    before = layer.buffers[0].data_ptr()
    layer.update(*states(1, 1, 0))
    assert layer.buffers[0].data_ptr() == before


def test_another_shape_is_refused() -> None:
    layer = TokenMajorLayer()
    layer.update(*states(2, 4, 0))
    with pytest.raises(ValueError, match=r"\[2, 2, 8\].*\[1, 2, 8\]"):
        layer.update(*states(1, 4, 0))


def test_made_in_inference_mode_used_outside_of_it() -> None:
    layer = TokenMajorLayer()
    with torch.inference_mode():
        layer.update(*states(1, 4, 0))
    layer.update(*states(1, 4, 1))
    layer.crop(-2)
    layer.update(*states(1, 300, 2))
    assert layer.get_seq_length() == 306


def test_gradients_flow_as_with_dynamic_layer() -> None:
    gradients = []
    for layer in (TokenMajorLayer(), DynamicLayer()):
        keys, values = (tensor.requires_grad_() for tensor in states(1, 4, 0))
        layer.update(keys, values)
        more_keys, more_values = states(1, 2, 1)
        all_keys, all_values = layer.update(more_keys, more_values)
        (all_keys.square().sum() + all_values.sum()).backward()
        gradients.append(keys.grad)
    assert torch.equal(*gradients)


def test_a_wider_dtype_is_kept() -> None:
    ours, theirs = TokenMajorLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*(tensor.bfloat16() for tensor in states(1, 4, 0)))
        layer.update(*states(1, 4, 1))
    assert ours.keys.dtype == theirs.keys.dtype
    assert_equal(ours, theirs)


def test_move_out_leaves_the_old_buffers_alone() -> None:
    layer = TokenMajorLayer()
    layer.update(*states(1, 8, 0))
    content, old = layer.keys.clone(), layer.buffers
    layer.move_out(8)
    for buffer in old:
        buffer.fill_(7.0)
    assert torch.equal(layer.keys, content)


def test_layers_survive_torch_save() -> None:
    layer = TokenMajorLayer()
    layer.update(*states(1, 8, 0))
    stream = io.BytesIO()
    torch.save((layer.keys, layer.values), stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream)[0], layer.keys)


def test_dynamic_cache_has_the_operations_compared_here() -> None:
    """If transformers gives layers a new operation, this list and the test above must learn it."""
    known = {
        "activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop", "get_mask_sizes",
        "get_max_cache_shape", "get_max_length", "get_seq_length", "lazy_initialization", "offload", "prefetch",
        "reorder_cache", "reset", "update",
    }  # fmt: skip
    public = {name for name in dir(DynamicLayer) if not name.startswith("_") and callable(getattr(DynamicLayer, name))}
    assert public <= known
