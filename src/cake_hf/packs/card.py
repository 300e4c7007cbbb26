"""The card of a pack: a description for people who did not make it. The Hub shows it as the repository's page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from cake_hf.layers.compat import GENERATE_LINE
from cake_hf.stores.manifest import MANIFEST, PackManifest
from cake_hf.stores.mismatch import lossy_codec
from cake_hf.util.sizes import bytes_text, count_text

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MOST = 500
"""Most characters of a publisher's description."""

_MOST_CUTS = 12
"""Most boundaries that are listed; a reply has one after each of its tokens."""


@dataclass(frozen=True)
class About:
    """A publisher's description of a pack, which cannot be derived from the chunks.

    Attributes:
        prompt: description of the prompt in one line; it is published.
        base_model: the model's name on the Hub, if the model was loaded from somewhere else.

    Raises:
        ValueError: `base_model` is not a name on the Hub.
    """

    prompt: str = ""
    base_model: str = ""

    def __post_init__(self) -> None:
        if self.base_model and not _HUB_NAME.fullmatch(self.base_model):
            raise ValueError(f"The base model is named as on the Hub, ORG/NAME, not {self.base_model[:60]!r}.")

    @property
    def line(self) -> str:
        """The prompt's description, escaped for a table cell."""
        text = " ".join(self.prompt.split())[:_MOST].replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
        return text or "not described by who published it"


def card_text(manifest: PackManifest, name: str, about: About) -> str:
    """Returns the card as Markdown with the Hub's metadata block."""
    first, last = manifest.tokens
    rows = {
        "base model": _base_model_text(manifest, about),
        "prompt": about.line,
        "dtype": manifest.dtype,
        "tokens": f"{first:,} to {last:,}, in {len(manifest.chunks) - len(manifest.tails):,} chunks of {manifest.chunk_size:,}"
        + (f" and {count_text(len(manifest.tails), 'tail')}" if manifest.tails else ""),
        **({"cut at tokens": _cuts_text(manifest)} if manifest.boundaries else {}),
        **({"snapshots": f"{len(manifest.states):,}, of the model's recurrent state"} if manifest.states else {}),
        "size": bytes_text(manifest.nbytes),
        "serves": _serves(manifest),
        "namespace": f"`{manifest.namespace}`",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    return f"""{_metadata(_base_model(manifest, about))}
# KV cache of a prompt for {_base_model(manifest, about) or manifest.model}

The KV cache of a prompt, computed once, for [transformers](https://github.com/huggingface/transformers) with
`cake_hf`. A prompt that starts with the same tokens is restored from here instead of computed: the model computes
from the front while chunks are loaded from the back.

| | |
|---|---|
{table}

## Use

```python
{_snippet(manifest, name, about)}
```

Or pull it into a store of your own: `cake-hf pull {name} ~/.cache/cake_hf`

## Trust

Every chunk is checked against its blake3 digest in the manifest before it is used; one that does not match is computed
instead. To mean these very bytes, name the commit: `hf://...@<40 digits>`. Digests say that the chunks are those that were
published, not that they are what the model would compute: use packs of people you trust. Users who have the model can
learn from a KV cache what the prompt was.
"""


def _base_model(manifest: PackManifest, about: About) -> str:
    """Returns the base model's name on the Hub; empty if unknown."""
    return about.base_model or (manifest.model if _HUB_NAME.fullmatch(manifest.model) else "")


def _base_model_text(manifest: PackManifest, about: About) -> str:
    name = _base_model(manifest, about)
    if not name:
        return f"`{manifest.model}`, which has no name on the Hub"
    link = f"[{name}](https://huggingface.co/{name})"
    return link + (f" at `{manifest.model_revision}`" if _revision(manifest, about) else "")


def _revision(manifest: PackManifest, about: About) -> str:
    """Returns the model's revision if the model is the base model; else an empty string."""
    return manifest.model_revision if _base_model(manifest, about) == manifest.model else ""


def _metadata(base_model: str) -> str:
    lines = ["---", "library_name: cake_hf", "tags:", "- cake_hf", "- kv-cache"]
    if base_model:
        lines.append(f'base_model: "{base_model}"')
    return "\n".join([*lines, "---"])


def _serves(manifest: PackManifest) -> str:
    numerics = manifest.facts.get("numerics")
    if not isinstance(numerics, dict):
        return "these weights in this dtype, on any machine (`exact=False`)"
    named = [f"{name} {numerics[name]}" for name in ("transformers", "torch", "device", "hardware") if name in numerics]
    processor = numerics.get("processor", {})
    named += [f"{name} {value}" for name, value in processor.items() if isinstance(value, str)]
    return f"only the very same numerics, bit for bit ({', '.join(named)})"


def _snippet(manifest: PackManifest, name: str, about: About) -> str:
    model = [json.dumps(_base_model(manifest, about) or manifest.model)]
    model += [f'revision="{revision}"'] if (revision := _revision(manifest, about)) else []
    model += [f"dtype=torch.{_TORCH_NAMES[manifest.dtype]}"] if manifest.dtype in _TORCH_NAMES else []
    used = "\n".join(filter(None, [prefill_line(manifest), GENERATE_LINE]))
    return f"""import torch
from transformers import AutoModelForCausalLM

from cake_hf import CakeCache

model = AutoModelForCausalLM.from_pretrained({", ".join(model)})
{cache_line(manifest, json.dumps(name))}
{used}"""


def cache_line(manifest: PackManifest, store: str) -> str:
    """Returns the line of Python that makes a cache which finds the pack's chunks."""
    options = ["model", store, f"chunk_size={manifest.chunk_size}"]
    options += [] if "numerics" in manifest.facts else ["exact=False"]
    options += [f"codec={codec!r}"] if (codec := lossy_codec(manifest.facts)) else []
    options += ["salt=..."] if manifest.salted else []
    return f"cache = CakeCache({', '.join(options)})"


def prefill_line(manifest: PackManifest) -> str:
    """Returns the line of Python with which a cache finds the pack's tails; empty if the pack has no tails.

    The end of a document is a boundary by itself, so it is not listed.
    """
    if not manifest.boundaries:
        return ""
    end = manifest.tokens[1]
    inner = [cut for cut in manifest.boundaries if cut < end]
    if len(inner) > _MOST_CUTS:
        return f"cache.prefill(ids[:, :{end}], boundaries=boundaries)  # those of {MANIFEST}"
    return f"cache.prefill(ids[:, :{end}]{f', boundaries={inner}' if inner else ''})"


def _cuts_text(manifest: PackManifest) -> str:
    named = [f"{cut:,}" for cut in manifest.boundaries[:_MOST_CUTS]]
    more = len(manifest.boundaries) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")
