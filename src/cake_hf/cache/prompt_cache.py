"""Handles a call of the cache's model: finds which part of it is a prompt, and restores that."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from cake_hf.blocks import HeldBlocks, blocks
from cake_hf.cache.phase import Phase, Work
from cake_hf.cache.prefix_cache import PrefixCache
from cake_hf.errors import CakeError
from cake_hf.layers import TokenMajorLayer
from cake_hf.model.caller import given_prompt, is_first_forward, is_within_generate
from cake_hf.model.look import look_again
from cake_hf.model.plainly import ComputePlainly
from cake_hf.report import Refusal
from cake_hf.restore.audit import audit_refusal
from cake_hf.restore.batch import BatchRestore
from cake_hf.restore.forwards import no_progress
from cake_hf.restore.hook import Rewritten
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.support import CLOSED, NO_CUTS_IN_BATCH, batch_refusal


class PromptCache(PrefixCache):
    """Restores the prompt in a call, and leaves its suffix to the model. See `RestoringCache`."""

    def _runs_compiled(self) -> bool:
        """Returns whether compiled code will run the forward that has started, or a part of it."""
        raise NotImplementedError  # `RestoringCache` has it

    def _new_row(self, layers: list[TokenMajorLayer]) -> PromptCache:
        """Returns a cache for one row of a batch, which may continue from what the layers hold."""
        raise NotImplementedError  # `RestoringCache` has it

    def _handle(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int
    ) -> Rewritten | None:
        """Restores the prompt that a forward brings and returns the call for the suffix; returns None to leave the call
        unchanged.

        Args:
            model: whose forward is called.
            args: positional arguments of the call.
            kwargs: its keyword arguments; this cache is among these or the positional ones.
            past: tokens in this cache.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        is_one_token = isinstance(ids, torch.Tensor) and ids.shape[-1] == 1
        if past and (not is_one_token or is_first_forward(model)):
            self._require_same_prompt(model, past)
        if past and is_one_token and ids is not None:
            self._hidden = None
            if self._turn is not None and (len(args) > 1 or not self._turn.decoded(ids, kwargs, past)):
                self._turn = None
            if ids.shape[0] > 1:
                self._repeat_single_row(ids)
            self._make_head_major()
            return None  # decoding: the hot path
        if not self._counts():
            if not is_one_token and self._model_refusal is not None:
                self._refuse(ForwardCall.parse(model, args, kwargs, self, 0), self._model_refusal)
            return None
        if not past and self._hidden is None:
            super().reset()  # the cache may have been cropped to nothing, and have had another number of rows
            self._seals.forget()
            self._seen.forget()
        call = ForwardCall.parse(model, args, kwargs, self, past)
        if self._brings_all(call):
            if call.vision is None:
                return self._handle_rest(call.without_past())
            self.reset()  # what the call brings beside its tokens is for the whole prompt
            return self._handle(model, args, kwargs, 0)
        return self._handle_call(call)

    def _handle_rest(self, rest: ForwardCall) -> Rewritten:
        """Handles the new tokens of a call that also brings tokens already held; see `_handle`."""
        if rest.tokens > 1:
            rewritten = self._handle_call(rest)
        else:  # decoding without `use_cache`
            self._repeat_single_row(rest.ids)
            rewritten = None
        return rewritten or ((), rest.piece(0, rest.tokens))

    def _handle_call(self, call: ForwardCall) -> Rewritten | None:
        """Handles a call, from the end of a document on if the call continues from it; see `_handle`."""
        behind = self._after_document(call)
        if behind is not None:
            return self._handle_new(behind) or ((), behind.piece(0, behind.tokens))
        return self._handle_new(call)

    def _after_document(self, call: ForwardCall) -> ForwardCall | None:
        """If a call starts with the end of the document that the cache holds, shows that end; returns the call for the rest."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            return None
        self._forget_edited()
        if call.tokens > hidden.tokens and call.vision is None and self._continues(hidden, call.ids, call.past):
            within = replace(
                call, for_kv=call.for_kv or is_first_forward(self._session.model)
            )  # `generate` uses only the last logits
            if call.wanted_logits <= call.tokens - hidden.tokens and not self._refusal(within):
                self._show_hidden(hidden)
                return call.after(hidden.tokens)
        if not call.past:
            super().reset()
        return None

    def _handle_new(self, call: ForwardCall) -> Rewritten | None:
        """Handles a call that brings only new tokens; see `_handle`."""
        if call.past and call.wants_all_logits:
            self._turn = None
            self._repeat_single_row(call.ids)
            self._make_head_major()
            return None  # candidates of assisted decoding, not a prompt
        if not self._session.at_work.begin(self):
            self._refuse(call, CLOSED)
            return None
        prefilled = self._prefilled
        self._forget_prefilled()
        self._forget_edited()
        self._end_turn(call.past)
        if prefilled is not None and not self._goes_on(prefilled, call.past):
            prefilled = None
        is_rest = prefilled is not None and self._is_rest(call)
        if call.tokens:
            if call.past:
                self._repeat_single_row(call.ids)
            self._seen.note(call.past, call.ids)
        if is_rest and prefilled is not None and not call.is_padded:
            self._work = Work(Phase.SUFFIX, prefilled, begin=time.monotonic())
            if not replace(call, for_kv=True).refusal():
                self._begin_turn(call, 0, prefilled.namespace)
            return None
        if call.is_batch:
            return self._handle_batch(call)
        report = None if prefilled is None else prefilled.report
        if report is not None:  # more of the same prompt
            report.tokens = call.past + call.tokens
        # Compiled code cannot wait inside its layers.
        beyond = not self._runs_compiled()
        restore = self._restore(call, call.wanted_logits, no_progress, past_loads=beyond, report=report)
        if restore is None:
            if call.tokens < self._session.chunk_size and not self._refusal(call):
                self._begin_turn(call, 0, "")
            return None
        prompt = restore.prompt
        saved = len(prompt.keys) > prompt.chunks
        self._work = Work(Phase.SUFFIX, prompt, restore, begin=time.monotonic(), saved=saved)
        if prompt.keys or not prompt.blocks:
            self._begin_turn(call, call.tokens if saved else prompt.rest, prompt.namespace)
        try:
            return (), call.piece(prompt.rest, call.tokens)
        except BaseException:  # raised by the model's vision part
            self._give_up()
            raise

    def _brings_all(self, call: ForwardCall) -> bool:
        """Returns whether a call within `generate` brings the whole prompt, although the cache holds its start.

        This happens without `use_cache`, and in the first step of assisted decoding.
        """
        if not 0 < call.past < call.tokens or not is_within_generate(self._session.model):
            return False
        if call.arguments.get("use_cache") is not False and not call.begins_at_start:
            return False
        self._seen.require(call.ids, None, call.past)
        return True

    def _require_same_prompt(self, model: torch.nn.Module, past: int) -> None:
        """Checks that the prompt given to `generate` starts with the content, since `generate` skips these tokens unchecked."""
        given = given_prompt(model)
        if given is not None:
            self._seen.require(given.ids, given.mask, past, longer=True)
            self._forget_changed_reply(given.ids)

    def _goes_on(self, prefilled: Prompt, past: int) -> bool:
        """Returns whether a call continues from what `prefill` has brought, if that is still there."""
        if prefilled.report.tokens_hurried:  # known up to the first rounded chunk only
            return past == prefilled.call.past + prefilled.rest
        return past == self._held.end

    def _is_rest(self, call: ForwardCall) -> bool:
        """Returns whether what comes after `prefill` is only a suffix.

        A full chunk counts as a suffix if it cannot be saved like the others.
        """
        size = self._session.chunk_size
        if self._is_cut_in(call):
            return False
        return call.tokens < size or (call.tokens == size and bool(self._refusal(call)))

    def _handle_batch(self, call: ForwardCall) -> Rewritten | None:
        """Handles several prompts, or a padded one; see `_handle`."""
        session, started = self._session, time.monotonic()
        refusal = self._refusal(call)
        if refusal is None and max(call.lengths) < session.chunk_size + call.wanted_logits:
            refusal = Refusal(
                "short-batch", f"no prompt of the batch is longer than a chunk of {session.chunk_size} tokens"
            )
        if refusal is None and call.is_repeated:
            return self._handle_repeated(call)
        if refusal := refusal or batch_refusal(self.layers):
            self._refuse(call, refusal)
            return None
        namespace = session.bound_model.namespace(call.ids)  # made once for all rows, since that takes milliseconds
        if refusal := audit_refusal(session.model, namespace):
            raise ComputePlainly(refusal)
        batch = BatchRestore(session, self.layers, call, namespace, started)
        self.report = batch.report
        batch.run(self._restore_row)
        if batch.found_some:
            batch.report.explain(None)  # drop the reason of a single row
        if self._cuts and not batch.report.reason:
            batch.report.explain(NO_CUTS_IN_BATCH)
        self._work = Work(Phase.BATCH, batch=batch)
        return (), call.piece(batch.start, call.tokens)

    def _handle_repeated(self, call: ForwardCall) -> Rewritten | None:
        """Handles equal rows, as for beams: restores one, with any kind of layers, and repeats it; see `_handle`."""
        prompt = self._prefill(call.ids[:1], call.wanted_logits, no_progress)
        if prompt is None:
            return None
        rows = call.ids.shape[0]
        self._repeat(call.ids)
        self._seen.note(0, call.ids)
        self.report.repeat(rows)
        self._work = Work(Phase.SUFFIX, prompt, begin=time.monotonic(), rows=rows)
        return (), call.piece(prompt.rest, call.tokens)

    def _restore_row(self, layers: list[TokenMajorLayer], known: list[str], ids: torch.Tensor, **counted: Any) -> None:
        """Restores one row of a batch, consisting of full chunks only, into its own layers, through a cache of its own."""
        look_again()  # the rows before may have taken seconds to load
        row = self._new_row(layers)
        row._held = HeldBlocks(blocks(0, len(known) * self._session.chunk_size, (), self._session.chunk_size), known)
        if row._prefill(ids, 0, no_progress, **counted) is None:
            raise CakeError(f"A row of the batch cannot be restored by itself: {row.report.reason}.")
