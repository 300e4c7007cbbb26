"""A cache into which the prefix of a prompt is brought, loaded from the store or computed by the model; see `restore`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cake_hf.cache.known_content import RememberingCache
from cake_hf.cache.phase import IDLE, Phase, Work
from cake_hf.cache.positions import HiddenBlock, Position, can_be_shortened
from cake_hf.model.fingerprint import adapters_vary
from cake_hf.model.foreign_code import Presses, as_it_is, foreign_code_refusal
from cake_hf.model.kv_layout import kv_template
from cake_hf.model.look import devices_of, home_device, look_again, one_look
from cake_hf.model.plainly import ComputePlainly
from cake_hf.model.ranks import ranks_of
from cake_hf.model.trials import forget_trials
from cake_hf.model.vision import numbering_refusal
from cake_hf.report import Refusal, Report
from cake_hf.restore.audit import audit_refusal
from cake_hf.restore.forwards import Progress, record_suffix
from cake_hf.restore.misses import NONE_YET, tell_missing
from cake_hf.restore.pacing import learn_costs, note_savings
from cake_hf.restore.plan import snapshot_refusal
from cake_hf.restore.prompt import CallBlocks, Prompt, off_schedule, open_prompt
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.restore import Restore
from cake_hf.restore.support import (
    MIXED_ADAPTERS,
    TRAINING,
    ahead_refusal,
    kept_refusal,
    misunderstood_refusal,
    ranks_refusal,
    tell_plain,
)

NO_FULL_CHUNK = Refusal("no-full-chunk", "the prompt has no full chunk before its last piece, which is always computed")
NOT_DETERMINISTIC = Refusal(
    "not-deterministic", "this model does not compute the same twice, so that its KV cannot be exchanged"
)
BATCH_AHEAD = Refusal("batch-prefill", "a batch is restored when the model is called with it, not before")


class PrefixCache(RememberingCache):
    """Restores a prompt's full chunks, or says why not; later finishes the restore, or abandons it. See `RestoringCache`.

    Attributes:
        presses_rest: presses are off in forwards with this cache while a prompt is being restored; see `foreign_code`.
    """

    presses_rest: bool
    _max_ttft: float | None = None  # rows of a batch are loaded whole

    def _be_idle(self, refusal: Refusal | None) -> None:
        """Initializes the state, with no prompt.

        Args:
            refusal: why the model's prompts are computed plainly; None if they are restored.
        """
        self._model_refusal = refusal
        self._work = IDLE
        self.presses_rest = False
        self._unpressed = False  # `prefill` has brought the start of a prompt without the presses

    @property
    def _prefilled(self) -> Prompt | None:
        """The prompt that `prefill` has brought and whose suffix has not come yet."""
        return self._work.prompt if self._work.phase is Phase.PREFILLED else None

    @_prefilled.setter
    def _prefilled(self, prompt: Prompt | None) -> None:
        if prompt is None:
            self._forget_prefilled()
        else:
            self._work = Work(Phase.PREFILLED, prompt)

    @property
    def _busy(self) -> bool:
        return self._work.phase is Phase.RESTORING

    def _restore(
        self,
        call: ForwardCall,
        leave: int | None,
        progress: Progress,
        *,
        past_loads: bool,
        report: Report | None = None,
        started: float | None = None,
        namespace: str | None = None,
    ) -> Restore | None:
        """Restores the call's full chunks, except for its last `leave` tokens.

        Args:
            call: one prompt, or the new part of it.
            leave: tokens; None for the last block.
            progress: see `prefill`.
            past_loads: see `Restore`.
            report: the report that counts this prompt; None for a new one.
            started: when the call came; None for now.
            namespace: of the session, if it was just made.

        Returns:
            The restore, to be closed or abandoned later; None if the call is to be left unchanged: the report says why.
        """
        session, started = self._session, time.monotonic() if started is None else started
        refusal = self._refusal(call)
        if refusal is None and call.tokens < session.chunk_size and not self._is_cut_in(call):
            refusal = Refusal(
                "short-prompt",
                f"the prompt has {call.tokens} new tokens, less than one chunk of {session.chunk_size}",
            )
        if self._model_refusal is None:
            refused = refusal is not None
            refusal = ranks_refusal(session.model, call, session.chunk_size, refused=refused) or refusal
        if refusal is None and namespace is None:
            session.bound_model.begin_namespace()
        if refusal := refusal or kept_refusal(session.model, self.layers, call.past + call.tokens):
            self._refuse(call, refusal)
            return None
        return self._restore_under(namespace, call, leave, progress, past_loads, report, started)

    def _restore_under(
        self,
        namespace: str | None,
        call: ForwardCall,
        leave: int | None,
        progress: Progress,
        past_loads: bool,
        report: Report | None,
        started: float,
    ) -> Restore | None:
        """Restores a call that is not refused; see `_restore`.

        Without a namespace, the latest one is assumed and checked while loads are under way, since making it takes
        milliseconds.

        Raises:
            ComputePlainly: the model turns out to be one whose KV cannot be exchanged.
        """
        session = self._session
        # Ranks of a tensor-parallel model must make it at the same time, so at once.
        assumed = namespace or ("" if ranks_of(session.model) else session.bound_model.latest_namespace())
        prompt = self._look_up(call, leave, assumed or session.bound_model.namespace(call.ids), report, started)
        self._note_chunks_of(prompt)
        vouched_for = session.bound_model.vouched_for == prompt.namespace
        if not vouched_for and (refusal := ahead_refusal(session.model)):
            self._refuse(call, refusal)
            return None
        restore = self._start(prompt, progress, past_loads=past_loads)
        try:
            found = (
                session.bound_model.namespace(call.ids)
                if assumed and not namespace and prompt.keys
                else prompt.namespace
            )
            if found == prompt.namespace:
                if refusal := audit_refusal(session.model, found):
                    raise ComputePlainly(refusal)
                restore.run()
                return restore
        except BaseException:
            self._abandon(restore)
            raise
        self._abandon(restore)  # the model has changed: the loads under way belong to the former one
        look_again()
        if session.bound_model.namespace(call.ids) != found:
            raise ComputePlainly(NOT_DETERMINISTIC)
        forget_trials(session.model)
        if refusal := kept_refusal(session.model, self.layers, call.past + call.tokens):
            raise ComputePlainly(refusal)
        return self._restore_under(found, call, leave, progress, past_loads, None, started)

    def _note_chunks_of(self, prompt: Prompt) -> None:
        """Chunks of the very model in the store vouch for it: they were saved only after it had passed its trials."""
        if self._session.exact and ranks_of(self._session.model) is None and any(prompt.stored):
            self._session.bound_model.vouched_for = prompt.namespace

    def _look_up(
        self, call: ForwardCall, leave: int | None, namespace: str, report: Report | None, started: float
    ) -> Prompt:
        """Matches the call's full chunks, except for its last `leave` tokens, against the store; returns the prompt."""
        session = self._session
        report = report or Report(tokens=call.past + call.tokens, chunk_size=session.chunk_size)
        wanted = CallBlocks.of(call, self._cuts, session.chunk_size, leave)
        if call.past == self._held.end:
            prompt = open_prompt(session, call, wanted, self._held, report, started, namespace)
        else:
            prompt = off_schedule(session, call, wanted, report, started)
        self.report = report
        if prompt.refusal is not None:
            report.explain(prompt.refusal)
        elif not report.reason:
            nothing = not (wanted.chunks or report.restored)
            report.explain(NO_FULL_CHUNK if nothing else snapshot_refusal(prompt))
        return prompt

    def _start(self, prompt: Prompt, progress: Progress, *, past_loads: bool) -> Restore:
        restore = Restore(
            self._session,
            self.layers,
            prompt,
            self._compute_chunk,
            progress,
            past_loads=past_loads,
            max_ttft=self._max_ttft,
        )
        self._work = Work(Phase.RESTORING, restore=restore)
        try:
            restore.start()
        except BaseException:
            self._abandon(restore)
            raise
        return restore

    def _compute_chunk(self, preempted: Callable[[], bool], arguments: dict[str, Any]) -> None:
        # Also runs in the middle of the suffix, if a load that the suffix waited for has failed.
        outside = self._work, self.presses_rest
        self._work, self.presses_rest = replace(self._work, phase=Phase.RESTORING, preempted=preempted), True
        try:
            with as_it_is(self._session.model):
                look_again()
                self._session.model(**arguments)
        finally:
            self._work, self.presses_rest = outside

    def _close(self, restore: Restore, *, save_suffix: bool = False) -> None:
        restore.close(save_suffix=save_suffix)
        self._work = IDLE
        prompt = restore.prompt
        if prompt.keys:
            count = restore.exact_blocks(prompt.chunks + save_suffix)
            past, blocks = prompt.call.past, prompt.blocks[:count]
            self._held.append([block.shifted(past) for block in blocks] if past else blocks, prompt.keys[:count])
        learn_costs(restore.cost_memory, restore.prompt, restore.pace, restore.took)
        if restore.brought:
            note_savings(restore.cost_memory, restore.prompt, time.monotonic() - restore.prompt.began)
        if prompt.inquiry is not None:
            refusal = prompt.inquiry.answer()
            if refusal is not None and prompt.report.reason_code == NONE_YET.code:
                prompt.report.explain(refusal)
                tell_missing(refusal)

    def _abandon(self, restore: Restore) -> None:
        self._work = IDLE
        restore.abandon()

    def _finish(self) -> None:
        """Ends the forward that ran a suffix; a suffix that was a full chunk on the schedule is treated like the others."""
        work = self._work
        if work.phase not in (Phase.SUFFIX, Phase.BATCH):
            return
        if work.batch is not None:
            work.batch.close()
            self._session.bound_store.count(work.batch.report)
        if work.prompt is not None:
            restore, devices = work.restore, devices_of(self._session.model)
            record_suffix(work.prompt, devices, work.begin, gated=restore is not None and restore.waited)
            if restore is not None:
                self._close(restore, save_suffix=work.saved)
            if restore is not None or work.rows > 1:
                self._session.bound_store.count(work.prompt.report)
        self._work = IDLE

    def _give_up(self) -> None:
        """Abandons the restore, or the suffix, that failed."""
        self.presses_rest = False
        work = self._work
        if work.phase is Phase.PREFILLED:
            return
        self._work = IDLE
        if work.batch is not None:
            work.batch.abandon()
        if work.restore is not None:
            work.restore.abandon()
        elif work.rows > 1:
            self.reset()

    def _brings_beginning(self) -> bool:
        """Whether the model is running the suffix of a prompt that started in this cache."""
        work = self._work
        return work.phase is Phase.SUFFIX and work.prompt is not None and not work.prompt.call.past

    def _press(self) -> None:
        """Applies the model's presses once the whole prompt has run, since they have not seen it."""
        self.presses_rest = False
        if (presses := Presses.on(self._session.model)).pressed:
            self._forget_content()
            presses.apply(self.layers)

    def _forget_prefilled(self) -> None:
        if self._work.phase is Phase.PREFILLED:
            self._work = IDLE

    def _prefill(self, input_ids: torch.Tensor, leave: int | None, progress: Progress, **counted: Any) -> Prompt | None:
        """Restores the new part of a prompt, except for its last `leave` tokens (None: its last block); returns None if
        refused.
        """
        model, past = self._session.model, self._length()
        self._seen.require(input_ids, None, past)
        ids = input_ids[:, past:].to(home_device(model))
        call = ForwardCall.parse(model, (), {"input_ids": ids}, self, past, for_kv=True)
        if call.is_batch:
            self._refuse(call, BATCH_AHEAD)
            return None
        try:
            with torch.no_grad(), one_look():
                restore = self._restore(call, leave, progress, past_loads=False, **counted)
            if restore is None:
                return None
            self._close(restore)
        except BaseException:
            self._give_up()
            raise
        self._seen.note(past, ids[:, : restore.prompt.rest])
        self._unpressed = not past
        return restore.prompt

    def _prefill_document(self, input_ids: torch.Tensor, progress: Progress, started: float) -> Prompt | None:
        """Restores the new part of a document `[1, tokens]`, and hides its last block; returns None if refused.

        All blocks are restored together if the layers can be shortened by the last one, and all of them will be known.
        """
        tokens, past = input_ids.shape[1], self._length()
        if tokens > past == self._held.end and can_be_shortened(self.layers) and self._max_ttft is None:
            prompt = self._prefill(input_ids, 0, progress, started=started)
            if tokens == self._held.end:
                begin = self._held.blocks[-1].start
                self._hide(input_ids, Position(begin, self._held.copy(), {}, {}))
            return prompt
        prompt = self._prefill(input_ids, None, progress, started=started)
        if tokens > self._length() == self._held.end:
            namespace = prompt.namespace if prompt is not None and prompt.keys else None
            prompt = self._prefill_end(input_ids, progress, started, namespace) or prompt
        return prompt

    def _hide(self, input_ids: torch.Tensor, begin: Position) -> None:
        """Hides all tokens of a document `[1, tokens]` after a position."""
        end = Position.take(self.layers, input_ids.shape[1], self._held)
        self._hidden = HiddenBlock(input_ids[:, begin.tokens :].cpu().clone(), end)
        begin.put(self.layers, kv_template(self._session.model))
        self._held = begin.held
        self._held.crop(begin.tokens)
        self._seen.crop(begin.tokens)

    def _prefill_end(
        self, input_ids: torch.Tensor, progress: Progress, started: float, namespace: str | None
    ) -> Prompt | None:
        """Brings the last block of a document without showing it; returns None if that is not possible.

        Args:
            input_ids: `[1, tokens]`, of the whole document.
            progress: see `prefill`.
            started: when `prefill` was called.
            namespace: of the session, if the blocks before the last one were just brought under it.
        """
        begin = Position.take(self.layers, self._length(), self._held)
        report, refusal = self.report, Refusal(self.report.reason_code, self.report.reason)
        if not report.restored:
            report.explain(None)  # "no full chunk" no longer applies
        unpressed = self._unpressed
        prompt = self._prefill(input_ids, 0, progress, report=report, started=started, namespace=namespace)
        self._unpressed |= unpressed
        if prompt is None or self._length() != input_ids.shape[1]:
            self.report = report
            report.explain(refusal)
            return None
        self._hide(input_ids, begin)
        return prompt

    def _refusal(self, call: ForwardCall) -> Refusal | None:
        """Returns why a call must be computed plainly; None if it can be restored."""
        model = self._session.model
        presses = Presses.on(model)  # puts each behind its gate, whatever else is found
        return (
            self._model_refusal
            or misunderstood_refusal(model)
            or call.refusal()
            or (TRAINING if model.training else None)
            or (MIXED_ADAPTERS if adapters_vary(model) else None)
            or numbering_refusal(model, call.arguments)
            or presses.refusal(self.layers, mixed=call.is_batch and not call.is_repeated)
            or foreign_code_refusal(model)
        )

    def _refuse(self, call: ForwardCall, refusal: Refusal) -> None:
        """Reports, and logs, that a call is computed plainly."""
        tell_plain(refusal)
        self._report_plain(refusal, call.past + call.tokens)
