"""The card of a pack: what a stranger reads before using it. The Hub shows it as the repository's page."""

from __future__ import annotations

import json
import re

from cake_hf.cache.compat import GENERATE_LINE
from cake_hf.people.units import bytes_text
from cake_hf.stores.manifest import PackManifest

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def card_text(manifest: PackManifest, name: str) -> str:
    """Markdown with the Hub's metadata block.

    Args:
        manifest: of the pack.
        name: how it is opened.
    """
    first, last = manifest.tokens
    rows = {
        "model": f"`{manifest.model}`" + (f" at `{manifest.model_revision}`" if manifest.model_revision else ""),
        "dtype": manifest.dtype,
        "tokens": f"{first:,} to {last:,}, in {len(manifest.chunks):,} chunks of {manifest.chunk_size:,}",
        **({"snapshots": f"{len(manifest.states):,}, of the model's recurrent state"} if manifest.states else {}),
        "size": bytes_text(manifest.nbytes),
        "serves": _serves(manifest),
        "namespace": f"`{manifest.namespace}`",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    return f"""{_metadata(manifest)}
# KV cache of a prompt for {manifest.model}

The KV cache of a prompt, computed once, for [transformers](https://github.com/huggingface/transformers) with
`cake_hf`. A prompt that starts with the same tokens is restored from here instead of computed: the model computes
from the front while chunks are loaded from the back.

| | |
|---|---|
{table}

## Use

```python
{_snippet(manifest, name)}
```

Or pull it into a store of your own: `cake-hf pull {name} ~/.cache/cake_hf`

## Trust

Every chunk is checked against its blake3 digest in the manifest before it is used; one that does not match is computed
instead. To mean these very bytes, name the commit: `hf://...@<40 digits>`. Digests say that the chunks are those that were
published, not that they are what the model would compute: use packs of people you trust. Whoever has the model can
learn from a KV cache what the prompt was.
"""


def _metadata(manifest: PackManifest) -> str:
    lines = ["---", "library_name: cake_hf", "tags:", "- cake_hf", "- kv-cache"]
    if _HUB_NAME.fullmatch(manifest.model):
        lines.append(f'base_model: "{manifest.model}"')
    return "\n".join([*lines, "---"])


def _serves(manifest: PackManifest) -> str:
    numerics = manifest.facts.get("numerics")
    if not isinstance(numerics, dict):
        return "these weights in this dtype, on any machine (`exact=False`)"
    named = [f"{name} {numerics[name]}" for name in ("transformers", "torch", "device", "hardware") if name in numerics]
    processor = numerics.get("processor", {})
    named += [f"{name} {value}" for name, value in processor.items() if isinstance(value, str)]
    return f"only the very same numerics, bit for bit ({', '.join(named)})"


def _snippet(manifest: PackManifest, name: str) -> str:
    model = [json.dumps(manifest.model)]
    model += [f'revision="{manifest.model_revision}"'] if manifest.model_revision else []
    model += [f"dtype=torch.{_TORCH_NAMES[manifest.dtype]}"] if manifest.dtype in _TORCH_NAMES else []
    cache = ["model", json.dumps(name), f"chunk_size={manifest.chunk_size}"]
    cache += [] if "numerics" in manifest.facts else ["exact=False"]
    cache += ["salt=..."] if manifest.salted else []
    return f"""import torch
from transformers import AutoModelForCausalLM

from cake_hf import CakeCache

model = AutoModelForCausalLM.from_pretrained({", ".join(model)})
cache = CakeCache({", ".join(cache)})
{GENERATE_LINE}"""
