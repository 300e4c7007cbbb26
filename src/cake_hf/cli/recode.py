"""`cake-hf recode`: stores the chunks of a store in another form, while others use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from cake_hf.chunks.codec import Buffer, parse_header
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.chunks.layout import ChunkLayout, Piece, dtype_named
from cake_hf.chunks.lossy import is_lossy
from cake_hf.chunks.stored_forms import can_be_encoded, check_any_file, encoded_file, raw_file
from cake_hf.chunks.tensor_table import TensorTable, offsets_of
from cake_hf.cli.console import WRONG, console, progress_bar
from cake_hf.cli.inspect_store import Progress, existing_store
from cake_hf.cli.options import Codec, StoreArgument
from cake_hf.errors import StoreError
from cake_hf.keys import behaviour_key, state_key
from cake_hf.stores.base import Store, total_bytes
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import bytes_text, count_text

MOST_TOLD = 3


@dataclass
class Recoded:
    """The result.

    Attributes:
        changed: chunks that are stored in the other form now.
        before, after: bytes of these.
        left: chunks that stay as they are: they have that form, or the codec does not make them smaller.
        lossy: those of them that a lossy codec encoded; no other form of the same KV is as small.
        failed: why others could not be read or written.
    """

    changed: int = 0
    before: int = 0
    after: int = 0
    left: int = 0
    lossy: int = 0
    failed: Sequence[str] = ()


def recode_command(
    store: StoreArgument,
    codec: Annotated[Codec, typer.Option(help="The form to store all chunks in: lossless, or none for raw ones.")],
) -> None:
    """Store all chunks in another form; exit code 1 if some could not be read or written.

    Each chunk is checked, encoded or decoded, compared and then replaced as a
    whole, so a reader finds one form or the other meanwhile,
    with the same KV. Ctrl-C ends it; what is done stays done, and running it
    again does the rest.
    """
    if codec not in (Codec.LOSSLESS, Codec.NONE):
        raise ValueError("recode stores the same KV in another form: --codec lossless or --codec none.")
    with existing_store(store) as opened:
        opened.check_writable()
        with progress_bar("recoding", "chunks") as progress:
            result = recode(opened, progress, encode=codec is Codec.LOSSLESS)
    console.print(
        f"{count_text(result.changed, 'chunk')} changed, from {bytes_text(result.before)} to {bytes_text(result.after)}; "
        f"{count_text(result.left, 'chunk')} left as they are{_lossy(result)}."
    )
    for why in result.failed[:MOST_TOLD]:
        console.print(why, style="red", markup=False)
    if result.failed:
        console.print(f"{count_text(len(result.failed), 'chunk')} could not be changed.", style="bold red")
        raise typer.Exit(WRONG)


def _lossy(result: Recoded) -> str:
    return f", {result.lossy:,} of them of a lossy codec" if result.lossy else ""


def recode(store: Store, progress: Progress, *, encode: bool) -> Recoded:
    """Stores all chunks encoded, or all raw. Snapshots of states, and recorded results, stay raw.

    Args:
        store: that can be written to.
        progress: called with (chunks looked at, all chunks).
        encode: whether to encode.
    """
    result, failed, keys = Recoded(), [], list(store.keys())
    for count, key in enumerate(keys, start=1):
        try:
            _recode(store, key, encode, result)
        except StoreError as error:
            failed.append(shown(error))
        progress(count, len(keys))
    return replace(result, failed=failed)


def _recode(store: Store, key: str, encode: bool, result: Recoded) -> None:
    raw = store.read(key)
    if raw is None:
        return
    facts = check_any_file(raw, key)
    if is_encoded(raw) and is_lossy(parse_encoded_header(raw)[0].codec):
        result.left, result.lossy = result.left + 1, result.lossy + 1
        return
    of_its_own = key in (state_key(facts.parent), behaviour_key(facts.namespace))
    if is_encoded(raw) == encode or (encode and of_its_own):
        result.left += 1
        return
    parts = _encoded(raw, key) if encode else [raw_file(raw, key)]
    if parts is None:
        result.left += 1
    elif store.contains([key])[0]:  # not evicted meanwhile
        store.write(key, parts, replace=True)
        result.changed += 1
        result.before += len(raw)
        result.after += total_bytes(parts)


def _encoded(raw: bytearray, key: str) -> list[Buffer] | None:
    """Returns the encoded file of a raw one that was checked, in parts; None if it stays raw."""
    facts, table = parse_header(raw)
    layout = _layout(table)
    if layout is None or layout.tensor_table != table or not can_be_encoded(layout):
        return None
    return encoded_file(memoryview(raw)[len(raw) - layout.nbytes :], layout, facts)


def _layout(table: TensorTable) -> ChunkLayout | None:
    """Returns the layout that has this table; None if no chunk of KV has it."""
    pieces, tokens = [], set()
    for name, entry in sorted(table.items(), key=lambda named: offsets_of(named[1])):
        shape = entry["shape"]
        if not isinstance(shape, list) or len(shape) != 3 or not all(shape):
            return None
        tokens.add(shape[0])
        pieces.append(Piece(name, shape[1], shape[2], dtype_named(str(entry["dtype"]))))
    return ChunkLayout(tokens.pop(), tuple(pieces)) if len(tokens) == 1 else None
