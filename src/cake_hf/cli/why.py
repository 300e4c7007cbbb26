"""`cake-hf why`: whether a prompt is found in a store, and if not, whether it is stored under other conditions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.padding import Padding
from rich.text import Text

from cake_hf.blocks import Block, tail_ends
from cake_hf.cli.console import WRONG, console, progress_bar
from cake_hf.cli.documents import Document, load_with, read_warmed
from cake_hf.cli.inspect_store import Inventory, StoredChunk, existing_store, take_inventory
from cake_hf.cli.options import StoreArgument, WarmedOptions, flat_options
from cake_hf.keys import block_keys, state_key
from cake_hf.packs.contents import session_for
from cake_hf.restore.misses import MissedPrompt, StoredElsewhere, explanation, found_elsewhere
from cake_hf.stores import Store
from cake_hf.stores.differences import in_a_sentence
from cake_hf.stores.records import records
from cake_hf.util.redaction import shown_url
from cake_hf.util.sizes import count_text


@dataclass(frozen=True)
class Agreement:
    """The longest stored beginning of a prompt.

    Attributes:
        tokens: its length.
        boundaries: the cuts that it was stored with.
        behind: tokens of the longest stored block that follows it and differs from the prompt's own; 0 if nothing is stored
            behind it.
    """

    tokens: int = 0
    boundaries: Sequence[int] = ()
    behind: int = 0


NOTHING = Agreement()
"""No stored prompt starts as this one does."""


def agreement(
    inventory: Inventory, namespace: str, tokens: memoryview, chunk_size: int, known: Mapping[str, Block]
) -> Agreement:
    """Follows a prompt through a store, block by block.

    Args:
        namespace: to search.
        tokens: of the prompt, 64-bit integers.
        known: the prompt's stored blocks, by key; blocks before one of these may be gone.
    """
    children: dict[str, list[StoredChunk]] = {}
    for chunk in inventory.chunks.values():
        children.setdefault(chunk.metadata.parent, []).append(chunk)
    ways: dict[str, tuple[str, Block]] = {key: ("", block) for key, block in known.items()}
    best, open_ends = (0, namespace), [(0, namespace), *((block.end, key) for key, block in known.items())]
    while open_ends:
        end, parent = open_ends.pop()
        best = max(best, (end, parent))
        for child in children.get(parent, ()):
            key = child.metadata.key
            for block in _ways(end, child.chunk_size, len(tokens)):
                if block_keys(namespace, tokens, [block], chunk_size, parent) == [key]:
                    if key not in known:
                        open_ends.append((block.end, key))
                    ways[key] = parent, block
    end, last = best
    path = list(_back(last, ways))[::-1]
    behind = max((child.chunk_size for child in children.get(last, ())), default=0)
    return Agreement(end, tail_ends(path, chunk_size), behind)


def _back(key: str, ways: Mapping[str, tuple[str, Block]]) -> Iterator[Block]:
    """Returns the blocks that lead to a key, last one first; each ends where the one returned before it starts."""
    while key in ways:
        key, block = ways[key]
        yield block


def _ways(start: int, tokens: int, most: int) -> Iterator[Block]:
    """Returns the ways in which these tokens may have been run: in one forward, or one by one."""
    if start + tokens <= most:
        yield from (Block(start, start + tokens, singly) for singly in (False, True))


SHORT = 12
"""Digits of a namespace that are shown, as by `cake-hf ls`."""


@dataclass(frozen=True)
class Findings:
    """The places of a prompt's chunks.

    Attributes:
        chunks: how many the prompt has here, tails at declared boundaries included.
        stored: how many of these a cache would find.
        chunk_size: of a chunk, in tokens.
        elsewhere: namespaces that more of its chunks are stored under.
        otherwise: why nothing of it is stored, as a clause; empty if that is not known.
        end: tokens of its end that fill no chunk, if they are stored, as the end of a document is.
        agreed: the longest stored beginning of it, whatever its cuts.
        restored: tokens up to the last snapshot of the model's recurrent state; None if it has no such state.
        holes: chunks that are missing before the last one that is stored.
        known: tokens up to the end of the last stored chunk.
    """

    chunks: int
    stored: int
    chunk_size: int
    elsewhere: Sequence[StoredElsewhere] = ()
    otherwise: str = ""
    end: int = 0
    agreed: Agreement = NOTHING
    restored: int | None = None
    holes: int = 0
    known: int = 0


@flat_options
def why_command(
    store: StoreArgument,
    model: Annotated[str, typer.Option(help="A model's folder, or its name on the Hugging Face Hub.")],
    prompt: Annotated[Path, typer.Option(help="A text file with the prompt.")],
    warmed: WarmedOptions,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch, as in the process in question.")] = None,
) -> None:
    """Say whether a prompt is found in a store, and if not, why; exit code 1 if none of it is found.

    Give the options that the cache has. If chunks of the prompt are stored
    that were made differently (another number of threads, kind of attention,
    chunk size, dtype, version, processor, revision or adapter), it says what
    would have to match; it says nothing of chunks under another salt.
    If only the beginning is stored, it says how far the prompts agree.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    document = read_warmed(prompt, warmed)
    with existing_store(store) as opened:
        loaded, [ids] = load_with(model, [document], warmed)
        found = _look(opened, loaded, document, ids, warmed)
    show_found(found, shown_url(store))
    if not found.stored and not found.end:
        raise typer.Exit(WRONG)


def show_found(found: Findings, store: str) -> None:
    """Shows what a cache would find, then where else the prompt is stored."""
    style = "green" if found.stored or found.end else "bold red"
    end = f"the last {count_text(found.end, 'token')}"
    if found.chunks:
        told = f"{found.stored:,} of {count_text(found.chunks, 'chunk')} of this prompt"
        told += f", and {end}," if found.end else ""
        console.print(Text.assemble((told, style), f" would be found in {store}."), soft_wrap=True)
    elif found.end:
        console.print(
            Text.assemble((f"{end[0].upper()}{end[1:]}", style), f" would be found in {store}."), soft_wrap=True
        )
    else:
        console.print(
            f"The prompt has less than one chunk of {found.chunk_size} tokens: a cache stores nothing of it, unless it is "
            "declared to be a document (CakeCache.prefill, `cake-hf warm --prompt`)."
        )
    for there in found.elsewhere:
        saved = time.strftime("%Y-%m-%d", time.gmtime(there.record.last))
        head = (
            f"Namespace {there.record.namespace[:SHORT]} has {there.stored:,} of {count_text(len(there.keys), 'chunk')}"
        )
        console.print(Text(f"\n{head}, saved last on {saved}:"), soft_wrap=True)
        console.print(Padding(Text(f"{in_a_sentence(there.differences)}."), (0, 0, 0, 2)))
    if found.otherwise:
        console.print(Text(f"\nSo {found.otherwise}."))
    elif found.chunks and not found.stored and not found.elsewhere and not found.agreed.tokens:
        console.print(
            "\nNo other chunks of it are known. Compare the starts of the prompts: one token that differs "
            "changes all that follow. (Stores filled by cake_hf 0.1 do not tell what their chunks were made with.)"
        )
    for line in filter(None, (_what_is_gone(found), _where_it_parts(found), _what_states_allow(found))):
        console.print(f"\n{line}")


def _where_it_parts(found: Findings) -> str:
    """Returns up to which token the prompt agrees with a stored one; empty if all of it is found, or no stored prompt is
    like it."""
    agreed = found.agreed
    if found.stored == found.chunks and found.end:
        return ""
    if agreed.tokens > found.known and agreed.boundaries:
        inner = [cut for cut in agreed.boundaries if cut < agreed.tokens]
        told = f", boundaries={inner}" if inner else ""
        return (
            f"The first {count_text(agreed.tokens, 'token')} are stored as a document: declare its end, in Python by "
            f"cache.prefill(ids[:, :{agreed.tokens}]{told}), here by --boundary {agreed.tokens}."
        )
    if found.stored == found.chunks:
        return ""
    if agreed.behind and agreed.tokens:
        return (
            f"The first {count_text(agreed.tokens, 'token')} agree with what is stored; within the next {agreed.behind:,} they "
            "differ: compare the texts, the tokenizers and the chat templates there."
        )
    if agreed.behind:
        return (
            f"What is stored for this model and these options differs within the first {count_text(agreed.behind, 'token')}: "
            "compare the beginnings of the texts, the tokenizers, start tokens and the chat template."
        )
    if agreed.tokens and not found.elsewhere:
        return f"Nothing behind the first {count_text(agreed.tokens, 'token')} is stored."
    return ""


def _what_is_gone(found: Findings) -> str:
    """Describes chunks that are missing before the last stored one."""
    return f"{count_text(found.holes, 'chunk')} before these are gone, and will be computed." if found.holes else ""


def _what_states_allow(found: Findings) -> str:
    """Describes how far a model with recurrent states can be restored."""
    if found.restored is None or not found.stored or found.restored == found.known:
        return ""
    how = "CakeCache(snapshot_every=1) keeps one after each chunk"
    if not found.restored:
        return f"But no snapshot of the model's recurrent state is stored, without which all is computed; {how}."
    at = f"at token {found.restored:,}"
    return f"The last snapshot of the model's recurrent state is {at}; what follows it is computed. {how}."


def _look(store: Store, model: Any, document: Document, ids: torch.Tensor, warmed: WarmedOptions) -> Findings:
    tokens = ids[0].to(torch.int64).contiguous().numpy().data
    with session_for(model, store, **warmed.keyed) as session:
        namespace, metadata, name, size = (
            session.bound_model.namespace(),
            session.bound_model.latest_metadata(),
            session.bound_model.name,
            session.chunk_size,
        )
        has_states = bool(session.bound_model.state_layout().pieces)
    named = document.blocks(len(tokens), size)
    keys = block_keys(namespace, tokens, named, size)
    has = dict(zip(keys, map(bool, store.contains(keys)), strict=True)) if keys else {}
    is_end = bool(named) and not named[-1].fills(size)
    end = named[-1].tokens if is_end and has[keys[-1]] else 0
    chunks = keys[:-1] if is_end else keys
    stored = sum(has[key] for key in chunks)
    missed = MissedPrompt(namespace, metadata, warmed.salt, name, tokens, lambda named: [], [*document.boundaries])
    elsewhere = found_elsewhere(store, missed, records(store), all_chunks=True)
    known, agreed = {key: block for key, block in zip(keys, named, strict=True) if has[key]}, NOTHING
    if len(known) < len(keys):
        with progress_bar("reading headers", "chunks") as progress:
            agreed = agreement(take_inventory(store, progress), namespace, tokens, size, known)
    last = max((number for number, key in enumerate(keys) if has[key]), default=-1)
    otherwise = ""
    if keys and not any(has.values()) and not elsewhere and not agreed.tokens:
        otherwise = store.mismatch_reason(namespace, partial(dict, metadata))
        if not otherwise and (refusal := explanation(store, missed)):
            otherwise = refusal.text
    restored = _last_state(store, known) if has_states else None
    return Findings(
        chunks=len(chunks),
        stored=stored,
        chunk_size=size,
        elsewhere=elsewhere,
        otherwise=otherwise,
        end=end,
        agreed=agreed,
        restored=restored,
        holes=last + 1 - len(known),
        known=named[last].end if known else 0,
    )


def _last_state(store: Store, known: Mapping[str, Block]) -> int:
    """Returns the number of tokens up to the last stored snapshot; 0 if there is none."""
    stored = store.contains([state_key(key) for key in known]) if known else []
    return max((block.end for block, has_state in zip(known.values(), stored, strict=True) if has_state), default=0)
