"""`CakeCache`: a drop-in for `DynamicCache` that remembers prompts across calls, processes and machines."""

from __future__ import annotations

import copy
import copyreg
import time
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.frontier import Strategy
from cake_hf.arithmetic.limits import Limits
from cake_hf.arithmetic.report import Report
from cake_hf.arithmetic.schedule import checked_cuts
from cake_hf.cache.forwards import Progress, no_progress
from cake_hf.cache.handover import to_dynamic, to_quantized, to_static
from cake_hf.cache.plainly import ComputePlainly
from cake_hf.cache.restoring import RestoringCache
from cake_hf.cache.selfcheck import checked_layers
from cake_hf.cache.session import Session
from cake_hf.cache.standing import all_shown, show_tokens
from cake_hf.cache.support import refuse_unusable
from cake_hf.cache.token_ids import token_ids
from cake_hf.cache.vision import forget_numbering
from cake_hf.cache.which_model import resolve_model
from cake_hf.stores.base import Store
from cake_hf.stores.opening import StoreSpec


class CakeCache(RestoringCache):
    """A `DynamicCache` that keeps the KV of prompts in a store and brings it back, bit for bit.

        cache = CakeCache(model, store="~/.cache/cake_hf")
        model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

    When the model is called with a prompt and this cache, the prompt's full chunks are restored: computed from the front
    while background threads load from the back, until they meet. Chunks that were computed are saved in the background.
    Use one cache per conversation, as with `DynamicCache`; any number of caches may share a model and a store.

    Args:
        model: a decoder-only transformers model (PEFT-wrapped ones, too), with its weights loaded.
        store: a directory, a URL (see `open_store`), a list of these for tiers, or a `Store`, which stays open when the cache
            closes. By default what the environment variable `CAKE_HF_STORE` names.
        chunk_size: tokens per chunk, at least 16; "auto" is 128 on a CPU and 512 on a GPU. Part of the key: other sizes do not
            share chunks. Also part of what "exact" means: in bfloat16 other sizes round otherwise.
        salt: any text that separates tenants: chunks are found only under the salt they were saved with.
        save: write new chunks to the store. A read-only store, such as a pack, saves nothing.
        exact: use only KV made with the same numerics (device, processor, kernels, library versions, threads), which gives
            bit-for-bit equal results. With False, KV of the same weights and dtype made anywhere is used.
        strategy: "both"; or, to measure against, "compute" (load nothing) or "load" (compute only what is missing).
        limits: budgets of threads, seconds and bytes; by default `Limits.from_environment()`.
        snapshot_every: for models with recurrent states (linear attention, Mamba, short convolutions), which can only go on
            where a snapshot of these is stored: keep one after every so many chunks. In any case one is kept at the end of
            each prompt, and where a prompt leaves what it shares with stored ones; 0 for no others.

    Attributes:
        report: what happened to the last prompt.

    Raises:
        UnsupportedModel: the model is on the meta device, an encoder-decoder, or its forward takes no cache.
        StoreError: no store is named; or it cannot be opened, or not be written to while `save` is set, and never could in this
            process. (One that could, or does not answer in time, is gone without, see docs/stores.md.)
        ValueError: `chunk_size` is below 16, `strategy` is none of the three, or a `CAKE_HF_*` variable cannot be used.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        store: StoreSpec | None = None,
        *,
        chunk_size: int | str = "auto",
        salt: str = "",
        save: bool = True,
        exact: bool = True,
        strategy: str = "both",
        limits: Limits | None = None,
        snapshot_every: int = 0,
    ) -> None:
        if strategy not in list(Strategy):
            raise ValueError(f"strategy {strategy!r} is unknown; choose one of {', '.join(s.value for s in Strategy)}.")
        given, model = model, resolve_model(model, store)
        refuse_unusable(model)
        layers, reason = checked_layers(model)
        session = Session(
            model,
            store,
            chunk_size=chunk_size,
            salt=salt,
            save=save,
            exact=exact,
            strategy=Strategy(strategy),
            limits=limits or Limits.from_environment(),
            snapshot_every=snapshot_every,
            compiled=given,
        )
        super().__init__(session, layers, reason, passive=not layers)

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"CakeCache({state}{type(self._session.model).__name__}, {self._length()} tokens, {self.store!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CakeCache:
        """A cache with its own KV, on the same model, store and writer."""
        self._go_back_if_left()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if self.passive:  # as `copy` would do it, but for what copies share
            memo[id(self._session)] = self._session
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return copied
        with all_shown(self._ahead, self.layers):
            RestoringCache.__init__(copied, self._session, copy.deepcopy(self.layers, memo), self._model_reason)
        if self._ahead is not None:
            show_tokens(copied.layers, self._length())
        copied._ahead = self._ahead
        copied.report = copy.deepcopy(self.report, memo)
        if self._prefilled is not None and self._prefilled.report is self.report:
            copied._prefilled = replace(self._prefilled, report=copied.report)
        copied._held = self._held.copy()
        copied._seals = self._seals.copy(self.layers, copied.layers, self._held.blocks)
        copied._unpressed = self._unpressed
        copied._seen = self._seen.copy()
        return copied

    def __copy__(self) -> CakeCache:
        """As of any cache: another object with the same layers."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> Any:
        """Pickled as what it holds, a `DynamicCache`: model and store stay where they are."""
        plain = self.to_dynamic_cache()
        return copyreg._reconstructor, (type(plain), object, None), plain.__dict__  # type: ignore[attr-defined]  # pickle's own, left out of the stubs

    @property
    def store(self) -> Store:
        """The store behind this cache."""
        return self._session.bound_store.store

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all chunks that are to be saved are durable; False if `timeout` seconds did not suffice.

        Without a timeout it waits as long as chunks are being written, and gives up on a store that takes longer than
        `limits.exit_flush_seconds` for one chunk, or for its own flushing.
        """
        return self._session.flush(timeout)

    def close(self) -> None:
        """Save what is queued (waiting `limits.exit_flush_seconds` at most) and let go of model and store. Idempotent.

        Where another thread is in the midst of a prompt, that is brought to its end first, and this returns at once.
        """
        self._session.at_work.close(self._session.model, self._session.close)

    def __enter__(self) -> CakeCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prefill(
        self,
        input_ids: Any,
        *,
        boundaries: Iterable[int] = (),
        whole: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """Bring a document's KV into this cache without generating; `generate` then goes on from there with a question.

        The end of the document becomes a cut: what of it does not fill a chunk is held, stored and restored, too. What is
        generated is then that of a `DynamicCache` into which the document was run, in chunks, and then the question.

        Args:
            input_ids: `[1, tokens]` of the prompt from its start, as a tensor, an array, a list, or what the tokenizer returns;
                the tokens that the cache holds already are skipped. (A batch, or a prompt with images, is restored when the
                model is called with it.)
            boundaries: numbers of tokens from the prompt's start, of parts that other prompts share, such as a system prompt,
                or the turns of a conversation: these are cuts, too.
            whole: bring whole chunks only. The end is no cut then, as for a text that prompts go on from in the middle of a
                word.
            progress: called with (chunks that are there, all chunks).

        Returns:
            The report, also in `self.report`. Its `reason` says why nothing was done, if so.

        Raises:
            CakeError: the cache is closed, holds another prompt, or one that was cut elsewhere, or is being used by another
                thread.
            TypeError: what is given are no token ids, or the boundaries no whole numbers.
            ValueError: the ids have another form, other numbers than whole ones, or padding; or a boundary is outside of them.
        """
        ids = token_ids(input_ids)
        cuts = checked_cuts(boundaries, ids.shape[1])
        return self._bring(ids, cuts, whole=whole, ends=not whole, progress=progress or no_progress)

    def _bring(
        self, ids: torch.Tensor, cuts: list[int], *, whole: bool, ends: bool, progress: Progress = no_progress
    ) -> Report:
        """As `prefill`.

        Args:
            ids: of the prompt.
            cuts: that are declared.
            whole: also bring a chunk at the very end.
            ends: also bring the last piece.
            progress: see there.
        """
        if self.closed:
            raise CakeError("This CakeCache is closed; make a new one.")
        if self.passive:
            return self.report
        self._user.claim(self._session.model, self)
        if not self._session.at_work.begin(self):
            raise CakeError("This CakeCache is closed; make a new one.")
        declared, self._cuts = self._cuts, cuts
        try:
            return self._prefill_new(ids, 0 if whole else None if ends else 1, progress)
        finally:
            self._cuts = declared
            self._session.at_work.end(self)

    def _prefill_new(self, ids: torch.Tensor, leave: int | None, progress: Progress) -> Report:
        self._go_back_if_left()
        self._prefilled = None
        self._seals.look()
        self._forget_edited()
        self._forget_retold(ids)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and self._goes_on(ahead, ids):
            self._show_ahead(ahead)
        if not self._length():
            self.reset()
            forget_numbering(self._session.model)
        self._seen.require(ids, None, self._length())
        self._require_same_cuts()
        self._end_turn(self._length())
        if leave is None and ids.shape[1] > self._length():
            self._cuts = sorted({*self._cuts, ids.shape[1]})
        started = time.monotonic()
        try:
            prompt = self._prefill(ids, leave, progress, started=started)
            if leave is None and ids.shape[1] > self._length() == self._held.end:
                prompt = self._prefill_end(ids, progress, started) or prompt
        except ComputePlainly as because:
            self.report = Report(chunk_size=self._session.chunk_size, reason=str(because))
            return self.report
        if prompt is not None:
            self._prefilled = prompt
            self.report.prefill_seconds = time.monotonic() - prompt.started
            self._session.bound_store.count(self.report)
            self._seals.note(self.layers, self._held.blocks)
        return self.report

    @property
    def boundaries(self) -> list[int]:
        """Where what is known of the content was cut, in tokens from its start; for `prefill` and `generate` elsewhere."""
        return self._held.cuts(self._session.chunk_size)

    def end_turn(self) -> list[int]:
        """A turn of a conversation has ended: what was said in it, the reply included, is stored.

        As if it were a document's end. (Where the conversation goes on in this cache, the next turn does that by itself.)
        Another process takes the conversation up with the tokens, and with these boundaries: `prefill(ids, boundaries=...)`
        restores all of it, bit for bit. A reply was run token by token, so each of its tokens is a boundary.

        Returns:
            The boundaries. They end before what is not known: behind another way of decoding than token by token, a batch, or a
            crop.

        Raises:
            CakeError: another thread is using the cache.
        """
        if not self.passive and not self.closed:
            self._user.claim(self._session.model, self)
            self._go_back_if_left()
            self._seals.look()
            self._forget_edited()
            self._end_turn(self._length())
            self._seals.note(self.layers, self._held.blocks)
        return self.boundaries

    def to_dynamic_cache(self) -> DynamicCache:
        """A `DynamicCache` with a copy of what is in here, for tools that change the KV, or know only that class."""
        return to_dynamic(self, self._session.model.config)

    def to_static_cache(self, max_cache_len: int = 0, into: StaticCache | None = None) -> StaticCache:
        """A `StaticCache` with a copy of what is in here, for decoding that is compiled.

        Args:
            max_cache_len: tokens that it has room for.
            into: one to fill again, instead of a new one. Its tensors stay where they are, so nothing is compiled anew.

        Raises:
            ValueError: there is no room for what is in here and one token more, or `into` was made for other rows.
            CakeError: the model does not keep full attention in all layers.
        """
        return to_static(self, self._session.model.config, max_cache_len, into)

    def to_quantized_cache(self, backend: str, **options: Any) -> QuantizedCache:
        """A `QuantizedCache` with what is in here, quantized.

        Args:
            backend: as `QuantizedCache` knows it: "fp8", or "quanto" or "hqq" where their packages are installed.
            **options: of `QuantizedCache`.

        Raises:
            CakeError: the model does not keep full attention in all layers.
        """
        return to_quantized(self, self._session.model.config, backend, options)
