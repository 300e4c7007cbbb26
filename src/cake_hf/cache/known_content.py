"""A cache that knows its content: the blocks of a prompt, tokens decoded after them, and what it holds but does not show."""

from __future__ import annotations

import torch

from cake_hf.blocks import Block
from cake_hf.cache.positions import HiddenBlock
from cake_hf.cache.seals import Seals, SeenTokens
from cake_hf.cache.turns import Turn, known_turn, save_turn
from cake_hf.errors import CakeError
from cake_hf.layers import TokenMajorLayer
from cake_hf.layers.compat import keeps_attention
from cake_hf.model.fingerprint import look_at_weights
from cake_hf.model.kv_layout import kv_template
from cake_hf.report import Refusal, Report
from cake_hf.restore.guarded import GuardedCache
from cake_hf.restore.held import HeldBlocks
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.session import Session


class RememberingCache(GuardedCache):
    """What `RestoringCache` knows of its content.

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
        """Whether this cache can tell how many tokens it holds; one with recurrent states alone cannot."""
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
        """Whether a cut is declared within, or at the end of, the tokens of a call."""
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
        """Whether the tokens `[1, tokens]` of a prompt, from number `first` on, continue from the document's end."""
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
            look = 0 if namespace else look_at_weights(self._session.model)
            self._turn = Turn(call.past + known, call.ids[:, known:], namespace, look)

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
