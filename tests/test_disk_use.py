"""The page about disk use: its formula is what is stored, and its table is that formula."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from cake_hf import CakeCache, Limits, MemoryStore
from cake_hf.chunks.codec import header_size, stored_bytes
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.model.kv_layout import kv_template, state_layout
from families import family_model, here
from models import CHUNK, CHUNKS, prompt
from old_versions import OLD

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "disk-use.md").read_text(encoding="utf-8")
KIB, MIB, GIB = 2**10, 2**20, 2**30
TIMES = "\N{MULTIPLICATION SIGN}"


def token_bytes(layers: int, heads: int, sizes: tuple[int, ...], number_bytes: int) -> int:
    """The page's formula."""
    return layers * heads * sum(sizes) * number_bytes


def layout(layers: int, heads: int, sizes: Iterable[int], tokens: int) -> ChunkLayout:
    """Of a chunk of a model of that shape in bfloat16."""
    pieces = [
        Piece(f"layers.{layer}.{what}", heads, size, torch.bfloat16, layer, windowed=False)
        for layer in range(layers)
        for what, size in zip(("keys", "values"), sizes, strict=True)
    ]
    return ChunkLayout(tokens, tuple(pieces))


def rows() -> list[tuple[str, int, int, tuple[int, ...], list[str]]]:
    """Model, layers, KV heads, sizes of key and value, and what the page says of these."""
    lines = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \+ (\d+) \| (.+) \|$", PAGE, re.MULTILINE)
    return [
        (name, int(layers), int(heads), (int(key), int(value)), cells.split(" | "))
        for name, layers, heads, key, value, cells in lines
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].partition(",")[0])
def test_the_table_is_the_formula(row: tuple[str, int, int, tuple[int, ...], list[str]]) -> None:
    _, layers, heads, sizes, cells = row
    one = token_bytes(layers, heads, sizes, 2)
    assert layout(layers, heads, sizes, 512).nbytes == 512 * one
    shown = [f"{one / KIB:.1f} KiB", f"{512 * one / MIB:.1f} MiB", f"{32_768 * one / GIB:.1f} GiB"]
    assert cells == shown


def test_there_are_enough_rows() -> None:
    assert len(rows()) >= 8


SHAPES = {
    "Llama-2-7B": ("LlamaConfig", "num_hidden_layers", "num_key_value_heads", "head_dim"),
    "DeepSeek-V3": ("DeepseekV3Config", "num_hidden_layers", None, "kv_lora_rank"),
    "Qwen3-Next-80B-A3B": ("Qwen3NextConfig", None, "num_key_value_heads", "head_dim"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_that_transformers_has(name: str) -> None:
    """Of models whose shape is the default of its config."""
    config_class, layers, heads, size = SHAPES[name]
    config: Any = getattr(hf, config_class)()
    (row,) = [row for row in rows() if row[0].startswith(name)]
    count = config.layer_types.count("full_attention") if layers is None else getattr(config, layers)
    assert (row[1], row[2], row[3][0]) == (count, 1 if heads is None else getattr(config, heads), getattr(config, size))


def stored(family: str) -> list[int]:
    """Bytes of each value that a prompt of whole chunks leaves."""
    store = MemoryStore()
    with CakeCache(family_model(family), store, chunk_size=CHUNK) as cache:
        cache.prefill(prompt(CHUNK * CHUNKS), whole=True)
        assert cache.flush(60)
    return sorted(store.size(key) or 0 for key in store.keys())  # noqa: SIM118


TINY = {
    "llama": (2, 2, (8, 8)),
    "gpt2": (2, 4, (8, 8)),  # heads are not grouped
    "gemma3": (3, 2, (8, 8)),  # two of three layers have windows
    "gemma3n": (2, 2, (8, 8)),  # two of four use what others keep
    "deepseek_v3": (2, 1, (8, 8)),
    "deepseek_v32": (2, 1, (8, 8, 16)),  # an indexer
}


@pytest.mark.skipif(OLD, reason="older versions keep K and V of all heads of latent attention")
@pytest.mark.parametrize("family", here(*TINY))
def test_a_stored_chunk_has_the_formulas_bytes_and_a_header(family: str) -> None:
    layers, heads, sizes = TINY[family]
    payload = CHUNK * token_bytes(layers, heads, sizes, 4)
    values = stored(family)
    assert len(values) == CHUNKS
    assert all(payload < value <= payload + 16 * KIB for value in values)


@pytest.mark.skipif(OLD, reason="older versions have other names for these layers")
def test_states_are_stored_by_themselves() -> None:
    """One layer of three keeps KV; one snapshot comes at the end."""
    values = stored("qwen3_next")
    payload = CHUNK * token_bytes(1, 2, (8, 8), 4)
    assert len(values) == CHUNKS + 1
    assert sum(payload < value <= payload + 16 * KIB for value in values) >= CHUNKS


@pytest.mark.skipif(OLD, reason="older versions have other names for these layers")
def test_a_snapshot_is_as_large_as_the_page_says() -> None:
    """Per layer of linear attention: a state in float32, and a few columns of a convolution, in the model's dtype."""

    def snapshot_bytes(config: Any, layers: int, number_bytes: int) -> int:
        keys, values = config.linear_key_head_dim, config.linear_value_head_dim
        state = config.linear_num_value_heads * keys * values * 4
        columns = 2 * config.linear_num_key_heads * keys + config.linear_num_value_heads * values
        return layers * (state + columns * config.linear_conv_kernel_dim * number_bytes)

    tiny: Any = family_model("qwen3_next")
    assert state_layout(kv_template(tiny)).nbytes == snapshot_bytes(tiny.config, 2, 4)
    config: Any = hf.Qwen3NextConfig()
    size = snapshot_bytes(config, config.layer_types.count("linear_attention"), 2)
    assert f"states takes {size / MIB:.1f} MiB more" in PAGE


def test_headers_are_as_large_as_the_page_says() -> None:
    eight = layout(32, 8, (128, 128), 512)
    assert f"{header_size(eight) / KIB:.0f} KiB for a model of 32 layers" in PAGE
    assert stored_bytes(eight) == header_size(eight) + eight.nbytes


def test_docs_pages_agree_on_a_chunks_size() -> None:
    """About one model that all of them take as their example."""
    chunk = layout(32, 8, (128, 128), 512).nbytes
    assert f"{chunk / MIB:.0f} MiB" == "64 MiB"
    gpu, help_page = ((DOCS / name).read_text() for name in ("gpu.md", "does-it-help.md"))
    threads = Limits().loader_threads
    assert f"{STAGED_PER_THREAD} {TIMES} `Limits.loader_threads` {TIMES} the bytes of a chunk" in gpu
    assert f"of 512 tokens has {chunk / MIB:.0f} MiB" in gpu
    assert f"take up to {STAGED_PER_THREAD * threads * chunk / MIB:.0f} MiB" in gpu
    assert f"{1e3 * chunk / (10**9 / 8):.0f} ms" in re.sub(r"\s+", " ", help_page)
