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

from cake_hf.blocks import checked_cuts
from cake_hf.cache.convert import to_dynamic, to_quantized, to_static
from cake_hf.cache.positions import copied_layers, show_tokens
from cake_hf.cache.restoring import RestoringCache
from cake_hf.cache.self_check import checked_layers
from cake_hf.cache.token_ids import token_ids
from cake_hf.errors import CakeError
from cake_hf.limits import Limits
from cake_hf.model.plainly import ComputePlainly
from cake_hf.model.vision import forget_numbering
from cake_hf.model.which_model import resolve_model
from cake_hf.report import Report
from cake_hf.restore.bound_store import check_codec, checked_max_ttft
from cake_hf.restore.forwards import Progress, no_progress
from cake_hf.restore.session import Session
from cake_hf.restore.support import refuse_unusable
from cake_hf.scheduling.frontier import Strategy
from cake_hf.scheduling.pace import Rules
from cake_hf.stores.base import Store
from cake_hf.stores.opening import StoreSpec


class CakeCache(RestoringCache):
    """A `DynamicCache` that keeps the KV of prompts in a store and restores it, bit for bit.

        cache = CakeCache(model, store="~/.cache/cake_hf")
        model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

    When the model is called with a prompt and this cache, the prompt's full chunks are restored: the main thread computes from
    the front while background threads load from the back, until they meet. Computed chunks are saved in the background. Use one
    cache per conversation, as with `DynamicCache`; any number of caches may share a model and a store.

    Args:
        model: a decoder-only transformers model (it may be PEFT-wrapped), with its weights loaded.
        store: a directory, a URL (see `open_store`), a list of these for tiers, or a `Store`, which stays open when the cache
            closes. Defaults to the store that the environment variable `CAKE_HF_STORE` names.
        chunk_size: tokens per chunk, at least 16; "auto" is 128 on a CPU and 512 on a GPU. The size is part of the key, so
            caches with different sizes share no chunks. It is also part of what "exact" means: in bfloat16, other sizes round
            differently.
        salt: any text that separates tenants: chunks are found only under the salt they were saved with.
        save: write new chunks to the store. A read-only store, such as a pack, saves nothing.
        exact: use only KV made with the same numerics (device, processor, kernels, library versions, threads), which gives
            bit-for-bit equal results. With False, KV of the same weights and dtype is used wherever it was made.
        strategy: "both"; or, as a baseline for measurements, "compute" (load nothing) or "load" (compute only what is missing).
        limits: budgets of threads, seconds and bytes; defaults to `Limits.from_environment()`.
        snapshot_every: for models with recurrent states (linear attention, Mamba, short convolutions). Their prompts can be
            restored only up to a chunk with a stored snapshot of the states; this stores one after every so many chunks. A
            snapshot is always stored at the end of each prompt, and where a prompt diverges from stored ones; 0 stores no
            others.
        codec: how new chunks are stored. "none": as they are; "lossless": encoded, if the KV is bfloat16, in about 0.7 of the
            bytes; "auto": as "lossless", unless the store is in memory, or raw chunks load faster by what earlier prompts have
            shown. Decoding gives the very same bits and takes time, so it pays where the store is slower than that
            (docs/performance.md). Both forms have the same keys, and every cache reads both. Or a lossy codec, with
            `exact=False` ("near", "int8", "quantspec", "int4", "rot4", "cachegen", "kivi2"): full chunks but for the first go
            through it before the next chunk sees them. The output is then another one than without, and still the same
            whatever is stored. Such KV has keys of its own (docs/codecs.md).
        max_ttft: seconds from a prompt's arrival within which its first token should be there, with `exact=False` and
            codec="lossless" or "auto". Where stored chunks would take longer, only the upper 8 bits of their 11 are loaded, so
            that KV and output are not exact. It depends on the store's speed which chunks these are. The report counts them;
            nothing that they or what follows them gave is saved (docs/codecs.md). None: all chunks are loaded whole.
        rules: for tests, what decides between loading and computing; see `cake_hf.testing.Rules`.

    Attributes:
        report: what happened to the last prompt.

    Raises:
        UnsupportedModel: the model is on the meta device, is an encoder-decoder, or its forward takes no cache.
        StoreError: no store is named; or the store cannot be opened, or cannot be written to while `save` is set, and has never
            been usable in this process. (If it was usable before, or does not answer in time, the cache works without it:
            docs/stores.md.)
        ValueError: `chunk_size` is below 16, `strategy` or `codec` is unknown, the codec is lossy although `exact` is set,
            `max_ttft` is not positive or does not go with `exact` or `codec`, or a `CAKE_HF_*` variable cannot be used.
        CakeError: the codec needs a library that is not installed.
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
        codec: str = "none",
        max_ttft: float | None = None,
        rules: Rules | None = None,
    ) -> None:
        sides = Strategy(strategy)
        check_codec(codec, exact=exact)
        max_ttft = checked_max_ttft(max_ttft, codec, exact=exact)
        given, model = model, resolve_model(model, store)
        refuse_unusable(model)
        layers, refusal = checked_layers(model)
        session = Session(
            model,
            store,
            chunk_size=chunk_size,
            salt=salt,
            save=save,
            exact=exact,
            strategy=sides,
            limits=limits or Limits.from_environment(),
            snapshot_every=snapshot_every,
            codec=codec,
            compiled=given,
            rules=rules,
        )
        super().__init__(session, layers, refusal, passive=not layers)
        self._max_ttft = max_ttft

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"CakeCache({state}{type(self._session.model).__name__}, {self._length()} tokens, {self.store!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CakeCache:
        """Returns a cache with its own KV, on the same model, store and writer. Several threads may copy the same cache.

        Raises:
            CakeError: another thread is running the model with this cache.
        """
        with self._user.copying(self._session.model, self):
            return self._copied(memo)

    def _copied(self, memo: dict[int, Any]) -> CakeCache:
        self._go_back_if_left()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if self.passive:  # as `copy.deepcopy` would do it, except for what copies share
            memo[id(self._session)] = self._session
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return copied
        RestoringCache.__init__(
            copied, self._session, copied_layers(self.layers, self._hidden, memo), self._model_refusal
        )
        copied._hidden = self._hidden
        copied._max_ttft = self._max_ttft
        copied.report = copy.deepcopy(self.report, memo)
        if self._prefilled is not None and self._prefilled.report is self.report:
            copied._prefilled = replace(self._prefilled, report=copied.report)
        copied._held = self._held.copy()
        copied._seals = self._seals.copy(self.layers, copied.layers, self._held.blocks)
        copied._unpressed = self._unpressed
        copied._seen = self._seen.copy()
        return copied

    def __copy__(self) -> CakeCache:
        """Returns another object with the same layers, as for any cache."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> Any:
        """Pickles the content as a `DynamicCache`, without the model and the store."""
        plain = self.to_dynamic_cache()
        return copyreg._reconstructor, (type(plain), object, None), plain.__dict__  # type: ignore[attr-defined]  # pickle's own, left out of the stubs

    @property
    def store(self) -> Store:
        """The store behind this cache."""
        return self._session.bound_store.store

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all chunks to be saved are durable; returns False if `timeout` seconds were not enough.

        Without a timeout, waits as long as chunks are being written, and gives up if the store takes longer than
        `limits.exit_flush_seconds` for one chunk, or for its own flush.
        """
        return self._session.flush(timeout)

    def close(self) -> None:
        """Saves queued chunks (waiting at most `limits.exit_flush_seconds`) and releases model and store. Idempotent.

        If another thread is running a prompt with this cache, this returns at once; the prompt is still finished and saved.
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
        """Restores or computes a document's KV without generating; `generate` then continues from there with a question.

        The end of the document becomes a cut: its last tokens, which do not fill a chunk, are also held, stored and restored.
        The output is then that of a `DynamicCache` through which first the document was run in chunks, and then the question.

        Args:
            input_ids: `[1, tokens]` of the prompt from its start, as a tensor, an array, a list, or the tokenizer's output;
                tokens that the cache already holds are skipped. (A batch, or a prompt with images, is restored when the model
                is called with it.)
            boundaries: further cuts, as numbers of tokens from the prompt's start: the ends of parts that other prompts share,
                such as a system prompt or the turns of a conversation.
            whole: restore or compute whole chunks only, without a cut at the end: for a text that prompts may continue in the
                middle of a word.
            progress: called with (chunks done, all chunks).

        Returns:
            The report, also in `self.report`. If nothing was done, its `reason` says why.

        Raises:
            CakeError: the cache is closed, holds another prompt or one with other cuts, or is being used by another thread.
            TypeError: the argument is not token ids, or a boundary is not a whole number.
            ValueError: the ids have another shape, numbers that are not whole, or padding; or a boundary is outside the prompt.
        """
        ids = token_ids(input_ids)
        cuts = checked_cuts(boundaries, ids.shape[1])
        return self._bring(ids, cuts, whole=whole, ends=not whole, progress=progress or no_progress)

    def _bring(
        self, ids: torch.Tensor, cuts: list[int], *, whole: bool, ends: bool, progress: Progress = no_progress
    ) -> Report:
        """Implements `prefill`.

        Args:
            ids: token ids of the prompt.
            cuts: the declared cuts.
            whole: also bring a chunk that ends where the prompt ends.
            ends: also bring the suffix.
            progress: as for `prefill`.
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
            with self._session.wait_budget().in_this_thread():
                return self._prefill_new(ids, 0 if whole else None if ends else 1, progress)
        finally:
            self._cuts = declared
            self._seals.note(self.layers, self._sealed)
            self._session.at_work.end(self)

    def _prefill_new(self, ids: torch.Tensor, leave: int | None, progress: Progress) -> Report:
        self._go_back_if_left()
        self._prefilled = None
        self._seals.look()
        self._forget_edited()
        self._forget_changed_reply(ids)
        hidden, self._hidden = self._hidden, None
        if hidden is not None and self._continues(hidden, ids):
            self._show_hidden(hidden)
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
            if leave is None:
                prompt = self._prefill_document(ids, progress, started)
            else:
                prompt = self._prefill(ids, leave, progress, started=started)
        except ComputePlainly as because:
            self._report_plain(because.refusal)
            return self.report
        if prompt is not None:
            self._prefilled = prompt
            self.report.prefill_seconds = time.monotonic() - prompt.started
            self._session.bound_store.count(self.report)
        return self.report

    @property
    def boundaries(self) -> list[int]:
        """The cuts of the content, in tokens from its start; pass them to `prefill` or `generate` elsewhere."""
        return self._held.cuts(self._session.chunk_size)

    def end_turn(self) -> list[int]:
        """Stores the turn of a conversation that has just ended, including the reply, like the end of a document.

        (If the conversation continues in this cache, the next prompt does this automatically.) Another process resumes the
        conversation with its tokens and these boundaries: `prefill(ids, boundaries=...)` restores all of it, bit for bit. A
        reply was decoded token by token, so each of its tokens is a boundary.

        Returns:
            The boundaries. They end where the content is no longer known to be canonical: at decoding other than token by
            token, a batch, or a crop.

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
        """Returns a `DynamicCache` with a copy of the content, for tools that change the KV, or know only that class."""
        with self._user.copying(self._session.model, self):
            self._go_back_if_left()
            return to_dynamic(self, self._session.model.config)

    def copied_content(self) -> tuple[list[Any], torch.Tensor | None]:
        """Returns copies of the layers, with the end of a document that `prefill` brought, and the token ids in them.

        The ids are `[rows, tokens]`, or None if they are not all known, as those of a reply are not.
        """
        with self._user.copying(self._session.model, self):
            self._go_back_if_left()
            hidden, ids = self._hidden, self._seen.known(self._length())
            layers = copied_layers(self.layers, hidden, {})
        if hidden is not None:
            show_tokens(layers, hidden.end.tokens)
            if ids is not None or hidden.tokens == hidden.end.tokens:
                ids = torch.cat([ids.cpu(), hidden.ids] if ids is not None else [hidden.ids], dim=1)
        return layers, ids

    def to_static_cache(self, max_cache_len: int = 0, into: StaticCache | None = None) -> StaticCache:
        """Returns a `StaticCache` with a copy of the content, for compiled decoding.

        Args:
            max_cache_len: the number of tokens that the new cache has room for.
            into: a cache to refill instead of making one. Its tensors stay where they are, so nothing is compiled again.

        Raises:
            ValueError: there is no room for the content and one more token, or `into` was made for another number of rows.
            CakeError: the model does not keep full attention in all layers.
        """
        with self._user.copying(self._session.model, self):
            return to_static(self, self._session.model.config, max_cache_len, into)

    def to_quantized_cache(self, backend: str, **options: Any) -> QuantizedCache:
        """Returns a `QuantizedCache` with a quantized copy of the content.

        Args:
            backend: of `QuantizedCache`: "fp8" in recent versions of transformers, "quanto" or "hqq" if installed.
            **options: of `QuantizedCache`.

        Raises:
            CakeError: the model does not keep full attention in all layers.
        """
        with self._user.copying(self._session.model, self):
            return to_quantized(self, self._session.model.config, backend, options)
