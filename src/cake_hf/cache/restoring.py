"""A cache that handles the forwards of its model: a prompt among them is restored, but for the last piece."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from cake_hf.arithmetic.errors import CakeError, ForeignModel
from cake_hf.arithmetic.report import Report
from cake_hf.arithmetic.schedule import blocks
from cake_hf.cache.audit import refused_reason
from cake_hf.cache.batch import BatchRestore
from cake_hf.cache.call import ForwardCall
from cake_hf.cache.caller import given_prompt, is_first_forward, is_within_generate
from cake_hf.cache.checkpoint import Checkpoint
from cake_hf.cache.compat import begin_plainly
from cake_hf.cache.graphs import as_it_is, is_compiled
from cake_hf.cache.guarded import is_within
from cake_hf.cache.held import Held
from cake_hf.cache.layers import TokenMajorLayer
from cake_hf.cache.pace import learn_costs, note_savings
from cake_hf.cache.plainly import ComputePlainly
from cake_hf.cache.presses import Presses
from cake_hf.cache.probe import kv_like
from cake_hf.cache.prompt import Prompt, Wanted, look_up, off_schedule
from cake_hf.cache.remembering import RememberingCache
from cake_hf.cache.restore import ForwardLeft, Progress, Restore, never, no_progress, record_tail
from cake_hf.cache.session import Session
from cake_hf.cache.standing import Ahead, Standing
from cake_hf.cache.strangers import stranger_reason
from cake_hf.cache.support import (
    BYPASSED,
    CLOSED,
    NO_CUTS_IN_BATCH,
    NOT_USED_YET,
    batch_reason,
    is_misunderstanding,
    kept_reason,
    misunderstood_reason,
    not_understood,
    plain_layers,
    tell_once,
    tell_plain,
    unlike_reason,
    unseen_reason,
)
from cake_hf.cache.trials import forget_trials
from cake_hf.cache.user import User
from cake_hf.cache.vision import numbering_reason
from cake_hf.tensors.fingerprint import adapters_vary
from cake_hf.tensors.offload import devices_of, home_device
from cake_hf.tensors.parallel import ranks_of

Rewritten = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Tail:
    """The last piece of a prompt, while the model runs it.

    Attributes:
        prompt: whose piece it is.
        begin: when the model got it.
        saved: it is a block of the canonical schedule, and becomes known like the others.
        restore: of the chunks before it, whose last loads may still be under way; None where `prefill` has brought them.
        rows: how many equal prompts.
    """

    prompt: Prompt
    begin: float
    saved: bool = False
    restore: Restore | None = None
    rows: int = 1


class RestoringCache(RememberingCache):
    """What `CakeCache` does while its model runs. The hook on the model calls it before and after each forward.

    Args:
        session: what the cache shares with its rows and copies: model, store and settings.
        layers: of the cache, empty.
        reason: why the model's prompts are computed plainly; empty where they are restored.
        passive: the model, or the version of transformers, is not understood: be the plain cache that `DynamicCache` makes.

    Attributes:
        report: what happened to the last prompt.
    """

    def __init__(self, session: Session, layers: list[Any], reason: str, *, passive: bool = False) -> None:
        begin_plainly(self, session.model.config)
        if not passive:
            self.layer_class_to_replicate = None
            self.layers = layers
        self._remember(session, Report(reason=reason if passive else NOT_USED_YET), passive=passive)
        self._model_reason = reason
        self._user = User()
        self._depth = 0  # how deep inside a forward of our own model we are
        self._compiled = False  # the model was called by compiled code
        self._busy = False  # a restore is running: its forwards pass the hook untouched
        self._lost: Callable[[], bool] = never  # whether the chunk that is being computed has come from the store
        self._prefilled: Prompt | None = None  # brought by `prefill`; its last piece has not come yet
        self._tail: Tail | None = None  # the last piece that is in the model now
        self._running: Restore | None = None  # whose loads may be under way
        self._batch: BatchRestore | None = None  # whose last pieces are in the model now
        self._checkpoint: Checkpoint | None = None  # of the forward that runs now, or was left half way
        self.presses_rest = False  # in forwards with this cache, as long as a prompt is being restored; see `presses`
        self._unpressed = False  # `prefill` has brought the beginning of a prompt past them

    @property
    def is_compileable(self) -> bool:
        """`generate` is not to compile the decoding by itself, as it would for other caches than `DynamicCache`."""
        return False

    @property
    def closed(self) -> bool:
        """After `close()` the cache goes on as a plain cache: nothing is restored or saved any more."""
        return self._session.closed or self._session.at_work.closing

    @property
    def is_plain(self) -> bool:
        """Whether the hook has nothing to do for it. (A prompt that is in the model when it is closed is not cut off.)"""
        return self.passive or self._session.closed

    # What torch.compile traces: plain attributes only.

    def is_over(self) -> bool:
        return self._session.is_closed

    def is_inside(self) -> bool:
        return self._depth > 0

    def _is_in_graph(self) -> bool:
        return torch.compiler.is_dynamo_compiling() and (self._depth > 0 or self._session.is_closed)

    def _update_in_graph(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        keys, values = self._as_kept(layer_idx, key_states, value_states)
        return super()._update_in_graph(keys, values, layer_idx, *args, **kwargs)

    # What changes the content changes what is known about it.

    def crop(self, tokens_to_remove: int) -> None:
        self._go_back_if_left()
        super().crop(tokens_to_remove)
        self._prefilled = self._ahead = self._turn = None
        length = self._length()
        self._held.crop(length)
        self._seen.crop(length)

    def reset(self) -> None:
        super().reset()
        self._held.forget()
        self._prefilled = self._ahead = self._turn = None
        self._unpressed = False
        self._seals.forget()
        self._seen.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._go_back_if_left()
        super().reorder_cache(beam_idx)
        self._forget_content()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._go_back_if_left()
        super().batch_repeat_interleave(repeats)
        self._forget_content()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._go_back_if_left()
        super().batch_select_indices(indices)
        self._forget_content()

    # What looks at the content sees no half of a forward.

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        self._go_back_if_left()
        if not self._depth and not torch.compiler.is_dynamo_compiling():
            self._session.stay_in_front()
        return int(super().get_seq_length(*args, **kwargs))

    def _go_back_if_left(self) -> None:
        """If the last forward was left half way, the content is again what it was before it."""
        if torch.compiler.is_dynamo_compiling():  # a forward runs, and its frames are not to be looked at
            return
        if self._checkpoint is not None and self._checkpoint.is_over():
            self._go_back()

    def _go_back(self) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None:
            return
        restoring, self._turn = self._running, None
        self._give_up_tail()
        if self._running is not None:
            self._abandon(self._running)
        self._depth, self._busy, self._lost = 0, False, never
        if checkpoint.past and (restoring is not None or checkpoint.go_back(self.layers)):
            self._held = checkpoint.held.copy()
            self._seen.crop(checkpoint.past)
            self._seals.note(self.layers, self._held.blocks)
        else:
            self.reset()
        self._checkpoint = None

    def _before_update(self, layer: int, *, reads: bool) -> None:
        if self.passive:
            return
        if not self._depth:
            self._arrived_outside()
        if self._lost():
            raise ForwardLeft
        if reads and self._running is not None:
            self._running.await_layer(layer)

    def _before_unknown_update(self) -> None:
        if self._busy or self._tail is not None:
            raise NotImplementedError("the cache's update is called with arguments that cake_hf does not know")

    def _as_kept(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (keys, values) if self._batch is None else self._batch.keep(layer, keys, values)

    # Called by the hook.

    def _enter_model(
        self,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        traced: bool = False,
        compiled: bool = False,
    ) -> Rewritten | None:
        if model is not self._session.model:
            raise self._foreign()
        self._user.claim(model, self)
        rewritten = None
        if not self._busy:
            self._go_back()  # if the last forward was left half way; no two run at once
            self._depth = 0
            self._seals.look()
            past = self._length()
            self._compiled = traced or compiled
            self._checkpoint = Checkpoint.take(self.layers, past, self._held, traced=traced)
            try:
                rewritten = self._handle_if_understood(model, args, kwargs, past)
            except BaseException as error:
                self._session.at_work.end(self)
                if isinstance(error, CakeError):  # ours, before anything was changed
                    self._checkpoint = None
                raise
            known = self._turn is not None or self._tail is not None
            if known and self._runs_compiled():  # unlike what the chunks were run with
                self._turn = None
                if self._tail is not None:
                    self._tail = replace(self._tail, saved=False)
            # To a later turn presses do nothing, here as on any cache.
            self.presses_rest = self._unpressed or (self._tail is not None and not self._tail.prompt.call.past)
            self._unpressed = False
        self._depth += 1
        return rewritten

    def _runs_compiled(self) -> bool:
        """Whether compiled code will run the forward that has begun, or a part of it."""
        return self._compiled or is_compiled(self._session.model)

    def _leave_model(self, model: torch.nn.Module, *, failed: bool) -> None:
        if model is not self._session.model or self._depth == 0 or not self._user.is_here:
            return
        self._depth -= 1
        if self._busy:
            return
        try:
            self._leave_prompt(failed=failed)
        finally:
            self._session.at_work.end(self)

    def _leave_prompt(self, *, failed: bool) -> None:
        if failed:
            self._learn_from(sys.exc_info()[1])
            self._go_back()
            return
        batch, tail, self._batch, self._tail = self._batch, self._tail, None, None
        if batch is not None:
            batch.close()
            self._session.count(batch.report)
        if tail is not None:
            self._finish(tail)
        if self.presses_rest:
            self._press()
        self._settle()

    def _settle(self) -> None:
        """The forward has ended: the layers hold KV that the model made."""
        self._depth = 0
        self._seals.note(self.layers, self._sealed)
        self._checkpoint = None

    def _press(self) -> None:
        """The whole prompt is through, and the presses on the model have not seen it."""
        self.presses_rest = False
        if (presses := Presses.on(self._session.model)).pressed:
            self._forget_content()
            presses.apply(self.layers)

    def _learn_from(self, error: BaseException | None) -> None:
        """The last piece has failed. If we call the model in a way that it does not take, its next prompts are plain calls."""
        if self._tail is not None and isinstance(error, Exception) and is_misunderstanding(self._session.model, error):
            not_understood(self._session.model, error)

    def _enter_decoder(self) -> None:
        self._user.claim(self._session.model, self)
        self._go_back_if_left()
        if not self._depth:  # it was called by itself, and nothing is restored then
            self._seals.look()
            self._note_unseen()
            self._checkpoint = Checkpoint.take(self.layers, self._length(), self._held)
        self._depth += 1

    def _leave_decoder(self, *, failed: bool) -> None:
        if not self._user.is_here or not self._depth:
            return
        if self._depth > 1:
            self._depth -= 1
        elif failed:
            self._go_back()
        else:
            self._settle()

    def _handle_if_understood(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int
    ) -> Rewritten | None:
        """As `_handle`; where that fails since something about the model is not understood, the forward is left untouched."""
        held = self._held.copy()
        try:
            return self._handle(model, args, kwargs, past)
        except ComputePlainly as because:
            reason = str(because)
            tell_once(f"{type(model).__name__} {reason[:30]}", f"{reason}. Prompts are computed plainly")
        except Exception as error:
            if not is_misunderstanding(model, error):
                raise
            reason = not_understood(model, error)
            if not past:
                self.reset()
                self.layers, self._model_reason = plain_layers(model) or self.layers, reason
        self._held = held
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = past + (ids.shape[-1] if isinstance(ids, torch.Tensor) else 0)
        self.report = Report(tokens=tokens, chunk_size=self._session.chunk_size, reason=reason)
        return None

    def _handle(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int
    ) -> Rewritten | None:
        """Restore the prompt that a forward brings and leave the forward its last piece; None leaves it untouched.

        Args:
            model: whose forward is called.
            args: positional arguments of the call.
            kwargs: named ones, with this cache among them or the others.
            past: tokens in this cache.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        is_one_token = isinstance(ids, torch.Tensor) and ids.shape[-1] == 1
        if past and (not is_one_token or is_first_forward(model)):
            self._require_same_prompt(model, past)
        if past and is_one_token and ids is not None:
            self._ahead = None
            if self._turn is not None and (len(args) > 1 or not self._turn.decoded(ids, kwargs, past)):
                self._turn = None
            if ids.shape[0] > 1:
                self._spread(ids)
            self._lay_by_head()
            return None  # decoding: the hot path
        if not self._counts():
            if not is_one_token:
                call = ForwardCall.parse(model, args, kwargs, self, 0)
                self.report = self._plain_report(call, self._model_reason)
            return None
        if not past and self._ahead is None:
            super().reset()  # it may have been cropped to nothing, and had another number of rows
            self._seals.forget()
            self._seen.forget()
        call = ForwardCall.parse(model, args, kwargs, self, past)
        if self._brings_all(call):
            if call.vision is None:
                return self._handle_rest(call.without_past())
            self.reset()  # what it brings beside its tokens is for the whole prompt
            return self._handle(model, args, kwargs, 0)
        return self._handle_call(call)

    def _handle_rest(self, rest: ForwardCall) -> Rewritten:
        """As `_handle`, for what is new in a call that brings more."""
        if rest.tokens > 1:
            rewritten = self._handle_call(rest)
        else:  # decoding without `use_cache`
            self._spread(rest.ids)
            rewritten = None
        return rewritten or ((), rest.piece(0, rest.tokens))

    def _handle_call(self, call: ForwardCall) -> Rewritten | None:
        """As `_handle`, behind the end of a document where the call goes on from it."""
        behind = self._behind_document(call)
        if behind is not None:
            return self._handle_new(behind) or ((), behind.piece(0, behind.tokens))
        return self._handle_new(call)

    def _behind_document(self, call: ForwardCall) -> ForwardCall | None:
        """If a call begins with the end of the document that the cache has: show this, and return what is behind it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        self._forget_edited()
        if call.tokens > ahead.tokens and call.vision is None and self._goes_on(ahead, call.ids, call.past):
            within = replace(
                call, for_kv=call.for_kv or is_first_forward(self._session.model)
            )  # it takes the last logits
            if call.wanted_logits <= call.tokens - ahead.tokens and not self._refusal(within):
                self._show_ahead(ahead)
                return call.after(ahead.tokens)
        if not call.past:
            super().reset()
        return None

    def _handle_new(self, call: ForwardCall) -> Rewritten | None:
        """As `_handle`."""
        if call.past and call.wants_all_logits:
            self._turn = None
            self._spread(call.ids)
            self._lay_by_head()
            return None  # candidates of assisted decoding, not a prompt
        if not self._session.at_work.begin(self):
            self.report = self._plain_report(call, CLOSED)
            return None
        prefilled, self._prefilled = self._prefilled, None
        self._forget_edited()
        self._end_turn(call.past)
        if call.past != self._held.end:
            prefilled = None
        is_rest = prefilled is not None and self._is_rest(call)
        if call.tokens:
            if call.past:
                self._spread(call.ids)
            self._seen.note(call.past, call.ids)
        if is_rest and prefilled is not None and not call.is_padded:
            self._tail = Tail(prefilled, time.monotonic())
            self._begin_turn(call, 0, prefilled.namespace)
            return None
        if call.is_batch:
            return self._handle_batch(call)
        report = None if prefilled is None else prefilled.report
        if report is not None:  # it is the same prompt, and more of it
            report.tokens = call.past + call.tokens
        # What is compiled cannot wait in its layers.
        beyond = not self._runs_compiled()
        restore = self._restore(call, call.wanted_logits, no_progress, beyond_loads=beyond, report=report)
        if restore is None:
            if call.tokens < self._session.chunk_size and not self._refusal(call):
                self._begin_turn(call, 0, "")
            return None
        prompt = restore.prompt
        self._tail = Tail(prompt, time.monotonic(), len(prompt.keys) > prompt.chunks, restore)
        if prompt.keys or not prompt.blocks:
            self._begin_turn(call, call.tokens if self._tail.saved else prompt.rest, prompt.namespace)
        try:
            return (), call.piece(prompt.rest, call.tokens)
        except BaseException:  # of the model's vision part
            self._give_up_tail()
            raise

    def _brings_all(self, call: ForwardCall) -> bool:
        """Whether a call within `generate` brings the whole prompt, although the cache holds its beginning.

        So it is without `use_cache`, and in the first step of assisted decoding.
        """
        if not 0 < call.past < call.tokens or not is_within_generate(self._session.model):
            return False
        if call.arguments.get("use_cache") is not False and not call.begins_at_start:
            return False
        self._seen.require(call.ids, None, call.past)
        return True

    def _require_same_prompt(self, model: torch.nn.Module, past: int) -> None:
        """`generate` will cut off what is in here from the prompt that it was given, whatever it is."""
        given = given_prompt(model)
        if given is not None:
            self._seen.require(given.ids, given.mask, past, longer=True)
            self._forget_retold(given.ids)

    def _is_rest(self, call: ForwardCall) -> bool:
        """Whether what comes after `prefill` is no more than a last piece. A full chunk is, where it cannot be saved like the
        others."""
        size = self._session.chunk_size
        if self._is_cut_in(call):
            return False
        return call.tokens < size or (call.tokens == size and bool(self._refusal(call)))

    def _handle_batch(self, call: ForwardCall) -> Rewritten | None:
        """As `_handle`, for several prompts, or a padded one."""
        session, started = self._session, time.monotonic()
        reason = self._refusal(call)
        if not reason and max(call.lengths) < session.chunk_size + call.wanted_logits:
            reason = f"no prompt of the batch is longer than a chunk of {session.chunk_size} tokens"
        if not reason and call.is_repeated:
            return self._handle_repeated(call)
        if reason := reason or batch_reason(self.layers):
            self.report = self._plain_report(call, reason)
            return None
        namespace = session.namespace(call.ids)  # made once for all rows, since that takes milliseconds
        if reason := refused_reason(session.model, namespace):
            raise ComputePlainly(reason)
        batch = BatchRestore(session, self.layers, call, namespace, started)
        self.report = batch.report
        batch.run(self._restore_row)
        if self._cuts:
            batch.report.reason = batch.report.reason or NO_CUTS_IN_BATCH
        self._batch = batch
        return (), call.piece(batch.start, call.tokens)

    def _handle_repeated(self, call: ForwardCall) -> Rewritten | None:
        """As `_handle`, for rows that are all equal, as for beams: one is restored, of whatever layers, and repeated."""
        prompt = self._prefill(call.ids[:1], call.wanted_logits, no_progress)
        if prompt is None:
            return None
        rows = call.ids.shape[0]
        self._repeat(call.ids)
        self._seen.note(0, call.ids)
        self.report.repeat(rows)
        self._tail = Tail(prompt, time.monotonic(), rows=rows)
        return (), call.piece(prompt.rest, call.tokens)

    def _restore_row(self, layers: list[TokenMajorLayer], known: list[str], ids: torch.Tensor, **counted: Any) -> None:
        """Bring one row of a batch, all of it full chunks, into layers of its own, by a cache of its own."""
        row = RestoringCache(self._session, layers, self._model_reason)
        row._held = Held(blocks(0, len(known) * self._session.chunk_size, (), self._session.chunk_size), known)
        if row._prefill(ids, 0, no_progress, **counted) is None:
            raise CakeError(f"A row of the batch cannot be restored by itself: {row.report.reason}.")

    def _prefill(self, input_ids: torch.Tensor, leave: int | None, progress: Progress, **counted: Any) -> Prompt | None:
        """Restore what is new of a prompt, but for its last `leave` tokens (its last block, for None); None if it cannot be."""
        model, past = self._session.model, self.get_seq_length()
        self._seen.require(input_ids, None, past)
        ids = input_ids[:, past:].to(home_device(model))
        call = ForwardCall.parse(model, (), {"input_ids": ids}, self, past, for_kv=True)
        if call.is_batch:
            self.report = self._plain_report(call, "a batch is restored when the model is called with it, not before")
            return None
        with torch.no_grad():
            restore = self._restore(call, leave, progress, beyond_loads=False, **counted)
        if restore is None:
            return None
        self._close(restore)
        self._seen.note(past, ids[:, : restore.prompt.rest])
        self._unpressed = not past
        return restore.prompt

    def _prefill_end(self, input_ids: torch.Tensor, progress: Progress, started: float) -> Prompt | None:
        """Bring the last piece of a document, without showing it; None if that is not possible."""
        past = self.get_seq_length()
        begin = Standing.take(self.layers, past, self._held)
        ids = input_ids[:, past:]
        report, reason = self.report, self.report.reason
        if not report.restored:
            report.reason = ""  # that there is no chunk says nothing any more
        unpressed = self._unpressed
        prompt = self._prefill(input_ids, 0, progress, report=report, started=started)
        self._unpressed |= unpressed
        if prompt is None or self.get_seq_length() != input_ids.shape[1]:
            self.report, report.reason = report, reason
            return None
        self._ahead = Ahead(ids.cpu().clone(), Standing.take(self.layers, past + ids.shape[1], self._held))
        begin.put(self.layers, kv_like(self._session.model))
        self._held = begin.held
        self._seen.crop(past)
        return prompt

    def _refusal(self, call: ForwardCall) -> str:
        model = self._session.model
        training = "the model is in training mode" * model.training
        varying = "adapters are chosen by the row, or by the place in the prompt" * adapters_vary(model)
        numbering = numbering_reason(model, call.arguments)
        pressed = Presses.on(model).reason(call, self.layers)
        return (
            self._model_reason
            or misunderstood_reason(model)
            or call.refusal()
            or training
            or varying
            or numbering
            or pressed
            or stranger_reason(model)
        )

    def _plain_report(self, call: ForwardCall, reason: str) -> Report:
        if reason:
            tell_plain(reason)
        return Report(tokens=call.past + call.tokens, chunk_size=self._session.chunk_size, reason=reason)

    def _restore(
        self,
        call: ForwardCall,
        leave: int | None,
        progress: Progress,
        *,
        beyond_loads: bool,
        report: Report | None = None,
        started: float | None = None,
        namespace: str | None = None,
    ) -> Restore | None:
        """Restore the call's full chunks, but for its last `leave` tokens.

        Args:
            call: one prompt, or what is new of it.
            leave: tokens; None for the last block.
            progress: see `prefill`.
            beyond_loads: see `Restore`.
            report: where all is counted, if not in a new one.
            started: when the call came, if not now.
            namespace: of the session, where that was just made.

        Returns:
            What is to be closed, or given up, later; None if the call is to be left as it is: the report says why.
        """
        session, started = self._session, time.monotonic() if started is None else started
        reason = self._refusal(call)
        if not reason and call.tokens < session.chunk_size and not self._is_cut_in(call):
            reason = f"the prompt has {call.tokens} new tokens, less than one chunk of {session.chunk_size}"
        if not self._model_reason:
            reason = unlike_reason(session.model, call, session.chunk_size, reason) or reason
        if reason := reason or kept_reason(session.model, self.layers, call.past + call.tokens):
            self.report = self._plain_report(call, reason)
            return None
        self._busy = True
        try:
            return self._restore_under(namespace, call, leave, progress, beyond_loads, report, started)
        finally:
            self._busy = False

    def _restore_under(
        self,
        namespace: str | None,
        call: ForwardCall,
        leave: int | None,
        progress: Progress,
        beyond_loads: bool,
        report: Report | None,
        started: float,
    ) -> Restore:
        """As `_restore`, of a call that is not refused. Without a namespace the latest one is taken, and is checked while loads
        are under way, since making it takes milliseconds.

        Raises:
            ComputePlainly: the model turns out not to be one whose KV can be exchanged.
        """
        session = self._session
        # Ranks of a parallel model look at it all at the same time, that is, at once.
        assumed = namespace or ("" if ranks_of(session.model) else session.latest_namespace())
        prompt = self._look_up(call, leave, assumed or session.namespace(call.ids), report, started)
        restore = self._start(prompt, progress, beyond_loads=beyond_loads)
        try:
            found = session.namespace(call.ids) if assumed and not namespace and prompt.keys else prompt.namespace
            if found == prompt.namespace:
                if reason := refused_reason(session.model, found):
                    raise ComputePlainly(reason)
                restore.run()
                return restore
        except BaseException:
            self._abandon(restore)
            raise
        self._abandon(restore)  # the model is not what it was: what is on its way belongs to another one
        if session.namespace(call.ids) != found:
            raise ComputePlainly("this model does not compute the same twice, so that its KV cannot be exchanged")
        forget_trials(session.model)
        if reason := kept_reason(session.model, self.layers, call.past + call.tokens):
            raise ComputePlainly(reason)
        return self._restore_under(found, call, leave, progress, beyond_loads, None, started)

    def _look_up(
        self, call: ForwardCall, leave: int | None, namespace: str, report: Report | None, started: float
    ) -> Prompt:
        """The call's full chunks, but for its last `leave` tokens, as a prompt that the store was asked about."""
        session = self._session
        report = report or self._plain_report(call, "")
        wanted = Wanted.of(call, self._cuts, session.chunk_size, leave)
        report.reason = wanted.reason or report.reason
        if call.past == self._held.end:
            prompt = look_up(session, call, wanted, self._held, report, started, namespace)
        else:
            prompt = off_schedule(session, call, wanted, report, started)
            tell_plain(report.reason)
        self.report = prompt.report
        if not (wanted.chunks or report.restored or report.reason):
            report.reason = "the prompt has no full chunk before its last piece, which is always computed"
        return prompt

    def _start(self, prompt: Prompt, progress: Progress, *, beyond_loads: bool) -> Restore:
        restore = Restore(self._session, self.layers, prompt, self._compute_chunk, progress, beyond_loads=beyond_loads)
        self._running = restore
        try:
            restore.start()
        except BaseException:
            self._abandon(restore)
            raise
        return restore

    def _compute_chunk(self, lost: Callable[[], bool], arguments: dict[str, Any]) -> None:
        # Also in the middle of a forward, where a load that it waited for has failed.
        outside = self._lost, self._busy, self.presses_rest
        self._lost, self._busy, self.presses_rest = lost, True, True
        try:
            with as_it_is(self._session.model):
                self._session.model(**arguments)
        finally:
            self._lost, self._busy, self.presses_rest = outside

    def _finish(self, tail: Tail) -> None:
        """The prompt's last piece is through: if it was a full chunk on the schedule, it is like the others."""
        restore = tail.restore
        record_tail(
            tail.prompt, devices_of(self._session.model), tail.begin, gated=restore is not None and restore.waited
        )
        if restore is not None:
            self._close(restore, save_tail=tail.saved)
        if restore is not None or tail.rows > 1:
            self._session.count(tail.prompt.report)

    def _give_up_tail(self) -> None:
        """The last piece did not get through the model."""
        self.presses_rest = False
        if self._batch is not None:
            self._batch.abandon()
            self._batch = None
        tail, self._tail = self._tail, None
        if tail is not None and tail.restore is not None:
            self._abandon(tail.restore)
        elif tail is not None and tail.rows > 1:
            self.reset()

    def _close(self, restore: Restore, *, save_tail: bool = False) -> None:
        restore.close(save_tail=save_tail)
        self._running = None
        prompt = restore.prompt
        if prompt.keys:
            count = prompt.chunks + save_tail
            self._held.append([block.shifted(prompt.call.past) for block in prompt.blocks[:count]], prompt.keys[:count])
        learn_costs(restore.cost_memory, restore.prompt, restore.pace)
        if restore.brought:
            note_savings(restore.cost_memory, restore.prompt, time.monotonic() - restore.prompt.began)
        if (inquiry := restore.prompt.inquiry) is not None:
            inquiry.settle(restore.prompt.report)

    def _abandon(self, restore: Restore) -> None:
        self._running = None
        restore.abandon()

    def _arrived_outside(self) -> None:
        """KV arrives, and no forward of our model is known to run: it is another model's, or the hook was not called.

        The hook is not called where a model's `forward` is called by itself. Then this cache is a plain one.

        Raises:
            ForeignModel: it is another model's.
        """
        if self.closed:
            if not self._length():
                self.report = Report(chunk_size=self._session.chunk_size, reason=CLOSED)
            return
        if not is_within(self._session.model):
            raise self._foreign()
        self._note_unseen()

    def _note_unseen(self) -> None:
        """If a prompt begins, its report says that nobody asked us about it."""
        if not self._length():
            reason = unseen_reason(self._session.model)
            self.report = Report(chunk_size=self._session.chunk_size, reason=reason)

    def _note_bypassed(self, ids: torch.Tensor) -> None:
        """The model is called without this cache, although `generate` has it. It may be us who try the model out."""
        if not self._session.at_work.has(self):
            self.report = Report(tokens=ids.numel(), chunk_size=self._session.chunk_size, reason=BYPASSED)
            tell_plain(BYPASSED)

    def _foreign(self) -> ForeignModel:
        name = type(self._session.model).__name__
        return ForeignModel(
            f"This CakeCache belongs to one {name} and is used outside of it; make a CakeCache for each model, with that "
            "model as the first argument."
        )
