"""A cache that knows its content: the blocks of a prompt, tokens decoded after them, and what it holds but does not show.

The suffix of a prompt and the tokens decoded after it are a *turn*. Each of these forwards is a piece of the schedule, so that
the next turn can continue from known KV: the suffix becomes a tail, and decoded tokens are single ones. Nothing is done with
them until a prompt continues from there, or the caller asks for it; then the turn's KV in the layers is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from cake_hf.blocks import Block, HeldBlocks, blocks
from cake_hf.cache.guards import GuardedCache
from cake_hf.cache.positions import HiddenBlock
from cake_hf.cache.seals import Seals, SeenTokens
from cake_hf.chunks.codec import ChunkMetadata
from cake_hf.errors import CakeError
from cake_hf.keys import block_keys, state_key
from cake_hf.layers import RecurrentLayer, SlidingWindowLayer, TokenMajorLayer
from cake_hf.layers.compat import keeps_attention
from cake_hf.layers.recurrent import states_of
from cake_hf.model.fingerprint import adapters_vary, look_at_weights
from cake_hf.model.foreign_code import foreign_code_refusal
from cake_hf.model.kv_layout import kv_template
from cake_hf.model.ranks import ranks_of
from cake_hf.model.seal import ModelSeal
from cake_hf.report import Refusal, Report
from cake_hf.restore.audit import audit_refusal
from cake_hf.restore.prompt import stored_mask
from cake_hf.restore.request import ForwardCall, understands
from cake_hf.restore.session import Session
from cake_hf.restore.support import ahead_refusal, kept_refusal

_OTHER_KERNELS = "output_attentions"
"""An argument with which attention may be computed in another way."""


class Turn:
    """The turn after one prompt, a single row without padding.

    Args:
        begin: the number of tokens before the suffix.
        ids: `[1, tokens]` of the suffix; zero tokens if it is known already.
        namespace: the namespace in which the blocks before it are known; empty if it was not determined.
        look: the signature of the model's weights when the suffix ran (`look_at_weights`).
        seal: on the model that runs the suffix.

    Attributes:
        begin, namespace, look, seal: see above.
        end: tokens up to the last one.
    """

    def __init__(self, begin: int, ids: torch.Tensor, namespace: str, look: int, seal: ModelSeal) -> None:
        self.begin, self.namespace, self.look, self.seal = begin, namespace, look, seal
        self.end = begin + ids.shape[1]
        self._ends = [self.end] if ids.shape[1] else []
        self._ids = [ids.clone()]
        self._numbers: list[torch.Tensor] = []
        self._unmasked: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        """The device of the turn's tokens."""
        return self._ids[0].device

    @property
    def first(self) -> Block | None:
        """The suffix of the prompt, if it is one forward of several tokens."""
        tokens = self._ids[0].shape[1]
        return Block(self.begin, self.begin + tokens) if tokens > 1 else None

    def decoded(self, ids: torch.Tensor, arguments: dict[str, Any], past: int) -> bool:
        """Adds a token `[1, 1]` that comes after `past` others; returns False if its KV cannot be predicted with certainty."""
        if past != self.end or ids.shape[0] != 1 or arguments.get(_OTHER_KERNELS) or not understands(arguments):
            return False
        if self.seal.is_broken():
            return False
        numbers, mask = arguments.get("position_ids"), arguments.get("attention_mask")
        if numbers is not None:
            if not isinstance(numbers, torch.Tensor) or numbers.numel() != 1:
                return False
            self._numbers.append(numbers.view(1) - past)
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != past + 1:
                return False
            self._unmasked.append(mask.all().view(1))
        self._ids.append(ids.clone())
        self.end += 1
        self._ends.append(self.end)
        return True

    def is_plain(self) -> bool:
        """Returns whether each token had its own position number and saw all tokens before it. Waits for the device."""
        numbered = not self._numbers or not bool(torch.cat(self._numbers).any())
        return numbered and (not self._unmasked or bool(torch.cat(self._unmasked).all()))

    def ids(self) -> torch.Tensor:
        """Returns `[1, tokens]` of the whole turn."""
        return torch.cat(self._ids, dim=1)

    def blocks(self, size: int) -> list[Block]:
        """Returns the blocks as they are stored, counted from the prompt's first token."""
        return blocks(self.begin, self.end, self._ends, size)


_CHUNK: Literal["chunk"] = "chunk"
_TAIL: Literal["tail"] = "tail"


def known_turn(session: Session, layers: list[Any], held: HeldBlocks, turn: Turn) -> tuple[HeldBlocks, str] | None:
    """Returns the blocks of a turn with their keys, and their namespace; None if their KV may not be what the keys say."""
    model = session.model
    if held.end != turn.begin or not turn.is_plain() or ranks_of(model) is not None or turn.seal.is_broken():
        return None
    if model.training or adapters_vary(model) or foreign_code_refusal(model):
        return None
    if kept_refusal(model, layers, turn.end) or ahead_refusal(model):
        return None
    if not turn.namespace and look_at_weights(model) != turn.look:
        return None
    ids = turn.ids()
    namespace = session.bound_model.namespace(ids)
    if namespace != (turn.namespace or namespace) or audit_refusal(model, namespace):
        return None
    named = turn.blocks(session.chunk_size)
    if session.bound_store.lossy is not None and any(block.fills(session.chunk_size) for block in named):
        return None  # a full chunk that was not coded, and so is not what its key says
    from_here = [block.shifted(-turn.begin) for block in named]
    tokens = ids[0].to("cpu", torch.int64).contiguous().numpy().data
    parent = held.keys[-1] if held.keys else namespace
    return HeldBlocks(named, block_keys(namespace, tokens, from_here, session.chunk_size, parent)), namespace


def save_turn(
    session: Session, layers: Sequence[Any], held: HeldBlocks, turn: HeldBlocks, namespace: str, report: Report
) -> Refusal | None:
    """Queues the blocks of a turn that are not stored. Returns why the store could not be asked for them, if so."""
    if not session.bound_store.saves or not turn.keys:
        return None
    save = partial(session.bound_store.save_chunk, made_with=session.bound_model.metadata_of(namespace))
    states = _states(session, layers)
    names = [*turn.keys, *([state_key(turn.keys[-1])] if states else [])]
    stored, refusal = stored_mask(session, names)
    parents = [held.keys[-1] if held.keys else namespace, *turn.keys]
    for number, (block, key) in enumerate(zip(turn.blocks, turn.keys, strict=True)):
        pieces = _pieces(layers, block, turn.end)
        if stored[number] or not pieces:
            continue
        metadata = ChunkMetadata(key, parents[number], len(held.keys) + number, namespace, session.bound_model.name)
        what = _CHUNK if block.fills(session.chunk_size) else _TAIL
        layout = session.bound_model.layout().of(block.tokens)
        save(metadata, layout, partial(list, pieces), report, overwrite=False, what=what)
    if states and not stored[-1]:
        key, number = turn.keys[-1], len(held.keys) + len(turn.keys) - 1
        metadata = ChunkMetadata(state_key(key), key, number, namespace, session.bound_model.name)
        layout = session.bound_model.state_layout()
        save(metadata, layout, partial(list, states), report, overwrite=False, what="state")
    return refusal


def _states(session: Session, layers: Sequence[Any]) -> list[torch.Tensor]:
    """Returns the current recurrent states, in the order of a snapshot; none if they do not have the layout's shapes."""
    named = {
        f"layers.{n}.{name}": state
        for n, layer in enumerate(layers)
        if isinstance(layer, RecurrentLayer)
        for name, state in states_of(layer).items()
    }
    found = [(named.get(piece.name), piece) for piece in session.bound_model.state_layout().pieces]
    fit = [s for s, p in found if s is not None and s.dtype == p.dtype and s.numel() == p.heads * p.head_dim]
    return fit if len(fit) == len(found) else []


def _pieces(layers: Sequence[Any], block: Block, end: int) -> list[torch.Tensor] | None:
    """Returns a block's pieces `[1, tokens, heads, head_dim]`; None if a sliding window has moved beyond the block."""
    kept = [
        buffer[:, block.start : block.end]
        for layer in layers
        if isinstance(layer, TokenMajorLayer) and layer.is_initialized
        for buffer in layer.buffers
    ]
    for layer in layers:
        if isinstance(layer, SlidingWindowLayer) and layer.keys is not None:
            first = end - layer.keys.shape[-2]
            if block.start < first:
                return None
            span = slice(block.start - first, block.end - first)
            kept += [states[:, :, span].transpose(1, 2) for states in (layer.keys, layer.values)]
    return kept


class RememberingCache(GuardedCache):
    """The part of `RestoringCache` that knows what the cache holds.

    Attributes:
        passive: it is a plain cache, of which nothing is known.
        report: what happened to the last prompt.
    """

    passive: bool
    report: Report

    def _remember(self, session: Session, report: Report, *, passive: bool) -> None:
        """Initializes the state, with no content."""
        self.passive, self.report = passive, report
        self._session = session
        self._held = HeldBlocks()  # what is known of the content
        self._cuts: list[int] = []  # declared for the next prompt
        self._hidden: HiddenBlock | None = None  # held, but not shown yet
        self._turn: Turn | None = None  # the tokens since then, if their KV can be known
        self._seen = SeenTokens()  # of the prompts in this cache
        self._seals = Seals()

    def _report_plain(self, refusal: Refusal, tokens: int = 0) -> None:
        """Starts a new report, of a prompt of that many tokens that is computed plainly."""
        self.report = Report(tokens=tokens, chunk_size=self._session.chunk_size)
        self.report.explain(refusal)

    def _length(self) -> int:
        """Returns the number of tokens in this cache; 0 if the cache cannot tell."""
        return int(self.get_seq_length()) if not self.passive and self._counts() else 0

    def _counts(self) -> bool:
        """Returns whether this cache can tell how many tokens it holds; one with recurrent states alone cannot."""
        return not self.layers or keeps_attention(self.layers)

    def _rows(self) -> int:
        """Returns the number of rows in this cache; 0 if no layer can tell."""
        return next((len(layer.keys) for layer in self.layers if getattr(layer, "keys", None) is not None), 0)

    def _repeat_single_row(self, ids: torch.Tensor) -> None:
        """Gives each of several prompts `[rows, tokens]` that continue from the single row in this cache a row of its own."""
        if ids.shape[0] > 1 and self._rows() == 1:
            self._repeat(ids)

    def _repeat(self, ids: torch.Tensor) -> None:
        """Repeats the single row in this cache for each row of the ids; recurrent layers offer no other way to do it."""
        self.reorder_cache(ids.new_zeros(ids.shape[0], dtype=torch.long))

    def _make_head_major(self) -> None:
        for layer in self.layers:
            if isinstance(layer, TokenMajorLayer):
                layer.make_head_major()

    def _forget_content(self) -> None:
        """Forgets which prompt the content belongs to."""
        self._held.forget()
        self._hidden = self._turn = None
        self._seen.forget()

    @property
    def _sealed(self) -> list[Block]:
        """The blocks whose KV is known, or will be."""
        first = self._turn.first if self._turn is not None and self._turn.begin == self._held.end else None
        return self._held.blocks if first is None else [*self._held.blocks, first]

    def _forget_edited(self) -> None:
        """Forgets the keys of chunks whose KV was edited."""
        if self._sealed and not self._seals.hold(self.layers, self._sealed):
            self._held.forget()
            self._turn = None

    def _is_cut_in(self, call: ForwardCall) -> bool:
        """Returns whether a cut is declared within, or at the end of, the tokens of a call."""
        return any(call.past < cut <= call.past + call.tokens for cut in self._cuts)

    def _require_same_cuts(self) -> None:
        """Checks that the known content was cut at the declared places.

        Raises:
            CakeError: it was not.
        """
        for cut in self._cuts:
            if cut < self._held.end and not self._held.is_edge(cut):
                raise CakeError(
                    f"The cache holds {self._held.end:,} tokens of a prompt that was not cut at {cut:,}; make a new CakeCache "
                    "for one that is."
                )

    def _continues(self, hidden: HiddenBlock, ids: torch.Tensor, first: int = 0) -> bool:
        """Returns whether the tokens `[1, tokens]` of a prompt, from number `first` on, continue from the document's end."""
        begin = hidden.end.tokens - hidden.tokens
        return self._held.end == self._length() == begin and hidden.begins(ids[:, begin - first :])

    def _show_hidden(self, hidden: HiddenBlock) -> None:
        begin = hidden.end.tokens - hidden.tokens
        hidden.end.put(self.layers, kv_template(self._session.model))
        self._held = hidden.end.held.copy()
        self._seen.note(begin, hidden.ids)

    def _begin_turn(self, call: ForwardCall, known: int, namespace: str) -> None:
        """Starts a turn: the model runs a suffix after the first `known` new tokens, and later prompts may continue from it."""
        if call.vision is None and not call.is_batch and call.tokens - known <= self._session.chunk_size:
            model = self._session.model
            look = 0 if namespace else look_at_weights(model)
            self._turn = Turn(call.past + known, call.ids[:, known:], namespace, look, self._session.bound_model.seal())

    def _forget_changed_reply(self, ids: torch.Tensor) -> None:
        """Forgets the turn if a prompt has other tokens for the reply, as text that is tokenized again may."""
        turn = self._turn
        if turn is not None:
            told = ids[:1, turn.begin : turn.end].to(turn.device)
            self._turn = turn if ids.shape[0] == 1 and torch.equal(told, turn.ids()) else None

    def _end_turn(self, length: int) -> None:
        """Ends the turn with `length` tokens in the cache: the turn's tokens become known, and are stored."""
        turn, self._turn = self._turn, None
        if turn is None or not turn.begin < turn.end == length:
            return
        found = known_turn(self._session, self.layers, self._held, turn)
        if found is not None:
            refusal = save_turn(self._session, self.layers, self._held, *found, self.report)
            if refusal is not None:
                self.report.explain(refusal)
            self._held.append(found[0].blocks, found[0].keys)
