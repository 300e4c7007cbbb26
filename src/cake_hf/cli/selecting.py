"""Selects chunks of a store: those of a document, of a model, of a namespace, or of a prompt by its last chunk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from cake_hf.cli.inspect_store import Inventory, StoredChunk, find_chunk, namespaces
from cake_hf.cli.options import WarmedOptions
from cake_hf.errors import StoreError
from cake_hf.keys import block_keys
from cake_hf.stores import Store

_DIGITS = re.compile(r"[0-9a-f]{1,64}", re.IGNORECASE)


@dataclass(frozen=True)
class Naming:
    """The options that name chunks, shared by `rm` and `pin`; they are to be named in one way."""

    prompt: Annotated[
        list[Path] | None,
        typer.Option(help="A document: the text file that was warmed. With --model; may be given several times."),
    ] = None
    model: Annotated[str, typer.Option(help="A model's folder or name; without --prompt, all of its chunks.")] = ""
    namespace: Annotated[str, typer.Option(help="The first digits of a namespace, as `cake-hf ls` shows them.")] = ""
    chunk: Annotated[
        str, typer.Option(help="The first digits of a prompt's last chunk, as `cake-hf ls` shows them.")
    ] = ""

    @property
    def ways(self) -> int:
        """The number of ways in which chunks are named."""
        return sum(map(bool, (self.prompt or self.model, self.namespace, self.chunk)))

    def refuse_unclear(self, nothing: str) -> None:
        """Raises an error if chunks are not named in exactly one way.

        Args:
            nothing: the message if they are not named at all.

        Raises:
            ValueError: see above.
        """
        if not self.ways:
            raise ValueError(nothing)
        if self.ways > 1:
            raise ValueError("Name chunks in one way: --prompt with --model, --model, --namespace, or --chunk.")
        if self.prompt and not self.model:
            raise ValueError("--prompt needs --model: whose KV of that document.")


@dataclass
class SelectedChunks:
    """The selected chunks of a store.

    Attributes:
        chains: for each prompt, its keys from the first chunk to the last one, stored or not.
        keys: the keys of chunks that are not named by their prompt.
    """

    chains: list[list[str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def stored(self, inventory: Inventory) -> list[str]:
        """Returns the selected chunks themselves, with the states at their ends."""
        wanted = {key for chain in self.chains for key in chain} | set(self.keys)
        return with_states(wanted, inventory)

    def to_delete(self, inventory: Inventory) -> tuple[list[str], int]:
        """Returns the selected chunks and all that continue a prompt from its end, except those that other prompts start
        with, too.

        Returns:
            The keys, and how many chunks stay for other prompts.
        """
        children: dict[str, list[str]] = {}
        for key, chunk in inventory.chunks.items():
            children.setdefault(chunk.metadata.parent, []).append(key)
        gone = set(self.keys)
        for chain in self.chains:
            gone |= _below(chain[-1], children)
        shared = 0
        for chain in self.chains:
            for number, key in enumerate(reversed(chain[:-1]), start=1):
                if not gone.issuperset(children.get(key, ())):
                    shared += sum(before in inventory.chunks for before in chain[: len(chain) - number])
                    break
                gone.add(key)
        return with_states(gone, inventory), shared


def choose(store: Store, inventory: Inventory, naming: Naming, warmed: WarmedOptions) -> SelectedChunks:
    """Finds the selected chunks.

    Raises:
        StoreError: the store has none of them.
        ValueError: the model or a file cannot be used, or digits are not hexadecimal.
        CakeError: no KV of the model is kept.
    """
    if naming.prompt:
        return SelectedChunks(*_of_documents(store, inventory, naming.prompt, naming.model, warmed))
    if naming.namespace:
        return SelectedChunks(keys=_of_namespace(inventory, naming.namespace))
    if naming.chunk:
        _refuse_no_digits("--chunk", naming.chunk)
        return SelectedChunks(chains=[_chain_to(find_chunk(store, naming.chunk), inventory)])
    return SelectedChunks(keys=_of_model(inventory, naming.model))


def with_states(keys: Iterable[str], inventory: Inventory) -> list[str]:
    """Returns those of the keys that are stored, and the snapshots at their ends."""
    wanted = set(keys)
    states = [key for key, state in inventory.states.items() if state.metadata.parent in wanted]
    return [*(key for key in inventory.chunks if key in wanted), *states]


def _below(key: str, children: dict[str, list[str]]) -> set[str]:
    """Returns a chunk and all that continue from it, by parents."""
    found, left = {key}, [key]
    while left:
        new = [child for child in children.get(left.pop(), ()) if child not in found]
        found.update(new)
        left += new
    return found


def _of_documents(
    store: Store, inventory: Inventory, prompts: Sequence[Path], model_name: str, warmed: WarmedOptions
) -> tuple[list[list[str]], list[str]]:
    """Returns for each document the keys up to its end (or to its last chunk, if the end was not declared), and the tails
    after these."""
    # These take seconds to import.
    from cake_hf.cli.documents import load_with, read_warmed
    from cake_hf.packs.contents import session_for

    documents = {path: read_warmed(path, warmed) for path in prompts}
    model, tokens = load_with(model_name, list(documents.values()), warmed)
    with session_for(model, store, **warmed.keyed) as session:
        namespace, size = session.bound_model.namespace(), session.chunk_size
    chains, tails = [], []
    for (path, document), ids in zip(documents.items(), tokens, strict=True):
        named = document.blocks(ids.shape[1], size)
        chain = block_keys(namespace, ids[0].tolist(), named, size)
        if not any(key in inventory.chunks for key in chain):
            raise StoreError(_nothing_of(path, size, len(chain) == 1 and not named[0].fills(size)))
        if len(chain) > 1 and not named[-1].fills(size):
            tails.append(chain.pop())
        chains.append(chain)
    return chains, tails


def _nothing_of(path: Path, size: int, is_short: bool) -> str:
    if is_short:
        return (
            f"The document {path} is shorter than a chunk of {size} tokens, and its end was not kept (`cake-hf warm --prompt` "
            "does that); nothing of it is stored."
        )
    return (
        f"The store has nothing of {path} for this model, chunk size, dtype, salt and machine; give the options that "
        "it was warmed with (`cake-hf ls STORE` shows what is there)."
    )


def _of_namespace(inventory: Inventory, digits: str) -> list[str]:
    _refuse_no_digits("--namespace", digits)
    found = [namespace for namespace in namespaces(inventory) if namespace.digest.startswith(digits.lower())]
    if len(found) > 1:
        raise StoreError(f"{len(found)} namespaces start with {digits}; give more digits.")
    if not found:
        raise StoreError(f"No namespace in the store starts with {digits}; `cake-hf ls STORE` lists them.")
    return [chunk.metadata.key for chunk in found[0].chunks]


def _of_model(inventory: Inventory, name: str) -> list[str]:
    wanted = {name, Path(name).name if _is_path(name) else name}
    found = [key for key, chunk in inventory.chunks.items() if chunk.metadata.model in wanted]
    if not found:
        there = sorted({chunk.metadata.model for chunk in inventory.chunks.values()})
        has = f"it has chunks of {', '.join(there)}" if there else "it is empty"
        raise StoreError(f"The store has nothing of the model {name!r}; {has}.")
    return found


def _is_path(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_absolute() or path.exists() or name.startswith((".", "~"))


def _chain_to(leaf: StoredChunk, inventory: Inventory) -> list[str]:
    """Returns the keys from the first stored chunk of a prompt to this one."""
    chain, current = [leaf.metadata.key], leaf
    while (
        parent := inventory.chunks.get(current.metadata.parent)
    ) and parent.metadata.index == current.metadata.index - 1:
        chain.append(parent.metadata.key)
        current = parent
    return chain[::-1]


def _refuse_no_digits(option: str, text: str) -> None:
    if not _DIGITS.fullmatch(text):
        raise ValueError(
            f"{option} takes the first hexadecimal digits of a name, not {text[:60]!r}; `cake-hf ls` shows it."
        )
