"""A cache that handles the forwards of its model: it restores a prompt that a forward brings, except for the suffix.

Its base classes, lowest first:

    guarded       runs checks before anything is added to the cache
    known_content knows what the cache holds
    prefix_cache  restores the prefix of a prompt (`restore`)
    prompt_cache  recognizes which part of a call is a prompt
    restoring     sees each forward start and end
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from cake_hf.cache.guards import Checkpoint, User, is_within
from cake_hf.cache.phase import Phase
from cake_hf.cache.prompt_cache import PromptCache
from cake_hf.errors import CakeError, ForeignModel
from cake_hf.layers import TokenMajorLayer
from cake_hf.layers.compat import begin_plainly
from cake_hf.model.foreign_code import is_compiled
from cake_hf.model.look import one_look
from cake_hf.model.plainly import ComputePlainly
from cake_hf.report import Refusal, Report
from cake_hf.restore.forwards import ForwardPreempted
from cake_hf.restore.hook import Rewritten
from cake_hf.restore.session import Session
from cake_hf.restore.support import (
    BYPASSED,
    CLOSED,
    NOT_USED_YET,
    is_misunderstanding,
    layers_or_refusal,
    not_understood,
    passes,
    plain_layers,
    tell_once,
    tell_plain,
    unseen_refusal,
)


class RestoringCache(PromptCache):
    """The part of `CakeCache` that acts while its model runs. The hook on the model calls it before and after each forward.

    Args:
        session: what the cache shares with its rows and copies: model, store and settings.
        layers: the layers of the cache, empty.
        refusal: why the model's prompts are computed plainly; None if they are restored.
        passive: the model, or the version of transformers, is not understood: be the plain cache that `DynamicCache` makes.

    Attributes:
        report: what happened to the last prompt.
    """

    def __init__(self, session: Session, layers: list[Any], refusal: Refusal | None, *, passive: bool = False) -> None:
        begin_plainly(self, session.model.config)
        if not passive:
            self.layer_class_to_replicate = None
            self.layers = layers
        self._remember(session, Report(), passive=passive)
        self.report.explain(refusal if passive else NOT_USED_YET)
        self._be_idle(refusal)
        self._user = User()
        self._depth = 0  # how many forwards of our own model, nested in each other, are running
        self._compiled = False  # the model was called by compiled code
        self._checkpoint: Checkpoint | None = None  # of the forward that is running, or was interrupted
        self._waits = session.wait_budget()  # of that forward

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must not decide to compile decoding, as it does for caches other than `DynamicCache`."""
        return False

    @property
    def closed(self) -> bool:
        """Whether `close()` was called. The cache then works as a plain cache: nothing more is restored or saved."""
        return self._session.is_closed or self._session.at_work.closing

    # What torch.compile traces: plain attributes only.

    def is_over(self) -> bool:
        # Closing the cache does not interrupt a prompt that the model is running: the session closes after that prompt.
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

    # Methods that change the content also change what is known about it.

    def crop(self, tokens_to_remove: int) -> None:
        self._go_back_if_left()
        super().crop(tokens_to_remove)
        self._forget_prefilled()
        self._hidden = self._turn = None
        length = self._length()
        self._held.crop(length)
        self._seen.crop(length)

    def reset(self) -> None:
        if not self.passive and passes(self._session.model, self._model_refusal):  # it was one prompt's alone
            layers, self._model_refusal = layers_or_refusal(self._session.model)
            self.layers = layers or self.layers
        super().reset()
        self._held.forget()
        self._forget_prefilled()
        self._hidden = self._turn = None
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

    # Methods that look at the content never see half a forward.

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        self._go_back_if_left()
        if not self._depth and not torch.compiler.is_dynamo_compiling():
            self._session.bound_model.hook.stay_in_front()
        return int(super().get_seq_length(*args, **kwargs))

    def _go_back_if_left(self) -> None:
        """Undoes the last forward if it was interrupted: the content becomes what it was before that forward."""
        if torch.compiler.is_dynamo_compiling():  # a forward is running, and its frames must not be inspected
            return
        if self._checkpoint is not None and self._checkpoint.is_over():
            self._go_back()

    def _go_back(self) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None:
            return
        restoring, self._turn = self._work.restore, None
        self._give_up()
        self._depth = 0
        if checkpoint.past and (restoring is not None or checkpoint.go_back(self.layers)):
            self._held = checkpoint.held.copy()
            self._seen.crop(checkpoint.past)
            self._seals.note(self.layers, self._held.blocks)
        else:
            self.reset()
        self._checkpoint = None

    # Called by the layers of the model, through `update`.

    def _before_update(self, layer: int, *, reads: bool) -> None:
        if self.passive:
            return
        if not self._depth:
            self._arrived_outside()
        work = self._work
        if work.preempted is not None and work.preempted():
            raise ForwardPreempted
        if reads and work.restore is not None and work.restore.pending:
            work.restore.await_layer(layer)

    def _before_unknown_update(self) -> None:
        if self._work.phase in (Phase.RESTORING, Phase.SUFFIX):
            raise NotImplementedError("the cache's update is called with arguments that cake_hf does not know")

    def _as_kept(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._work.batch
        return (keys, values) if batch is None else batch.keep(layer, keys, values)

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
            self._go_back()  # if the last forward was interrupted; no two run at once
            self._depth = 0
            self._seals.look()
            past = self._length()
            self._compiled = traced or compiled
            self._checkpoint = Checkpoint.take(self.layers, past, self._held, traced=traced)
            self._waits = self._session.wait_budget()
            try:
                with self._waits.in_this_thread(), one_look():
                    rewritten = self._handle_if_understood(model, args, kwargs, past)
            except BaseException as error:
                self._session.at_work.end(self)
                if self._work.phase is Phase.RESTORING:  # interrupted between two phases
                    self._go_back()
                if isinstance(error, CakeError):  # our own error, raised before anything was changed
                    self._checkpoint = None
                    self._seals.note(self.layers, self._sealed)
                raise
            # The chunks did not run compiled, so this piece would differ; checked only if something depends on it.
            if (self._turn is not None or self._work.saved) and self._runs_compiled():
                self._turn, self._work = None, replace(self._work, saved=False)
            # In a later turn presses do nothing, here as on any cache.
            self.presses_rest = self._unpressed or self._brings_beginning()
            self._unpressed = False
        self._depth += 1
        return rewritten

    def _runs_compiled(self) -> bool:
        """Returns whether compiled code will run the forward that has started, or a part of it."""
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
        with self._waits.in_this_thread():
            self._finish()
        if self.presses_rest:
            self._press()
        self._settle()

    def _settle(self) -> None:
        """Ends a forward: the layers hold KV that the model made."""
        self._depth = 0
        self._seals.note(self.layers, self._sealed, decoding=True)
        self._checkpoint = None

    def _learn_from(self, error: BaseException | None) -> None:
        """Handles a failed suffix: if we call the model in a way that it does not accept, its next prompts are plain calls.

        What comes after `prefill` is left as the caller made it, and so are its errors.
        """
        work = self._work
        if (
            work.phase is Phase.SUFFIX
            and (work.restore is not None or work.rows > 1)
            and isinstance(error, Exception)
            and is_misunderstanding(self._session.model, error)
        ):
            not_understood(self._session.model, error)

    def _enter_decoder(self) -> None:
        self._user.claim(self._session.model, self)
        self._go_back_if_left()
        if not self._depth:  # the decoder was called directly, so nothing is restored
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
        """Calls `_handle`; leaves the forward unchanged if that fails because the model is not understood in some respect."""
        held = self._held.copy()
        try:
            return self._handle(model, args, kwargs, past)
        except ComputePlainly as because:
            refusal, text = because.refusal, because.refusal.text
            tell_once(f"{type(model).__name__} {text[:30]}", f"{text}. Prompts are computed plainly")
        except Exception as error:
            if not is_misunderstanding(model, error):
                raise
            refusal = not_understood(model, error)
            if not past:
                self.reset()
                self.layers, self._model_refusal = plain_layers(model) or self.layers, refusal
        self._held = held
        ids = args[0] if args else kwargs.get("input_ids")
        self._report_plain(refusal, past + (ids.shape[-1] if isinstance(ids, torch.Tensor) else 0))
        return None

    def _arrived_outside(self) -> None:
        """Handles KV that arrives outside of our model's forward: it is another model's, or the hook was not called.

        The hook is not called if a model's `forward` method is called directly. The cache then works as a plain one.

        Raises:
            ForeignModel: it is another model's.
        """
        if self.closed:
            if not self._length():
                self._report_plain(CLOSED)
            return
        if not is_within(self._session.model):
            raise self._foreign()
        self._note_unseen()

    def _note_unseen(self) -> None:
        """Reports, if a prompt starts, that the hook did not see it."""
        if not self._length():
            self._report_plain(unseen_refusal(self._session.model))

    def _note_bypassed(self, ids: torch.Tensor) -> None:
        """Reports that `generate`, although it was given this cache, runs the model without it."""
        self._report_plain(BYPASSED, ids.numel())
        tell_plain(BYPASSED)

    def _foreign(self) -> ForeignModel:
        name = type(self._session.model).__name__
        return ForeignModel(
            f"This CakeCache belongs to one {name} and is used outside of it; make a CakeCache for each model, with that "
            "model as the first argument."
        )

    def _new_row(self, layers: list[TokenMajorLayer]) -> RestoringCache:
        return RestoringCache(self._session, layers, self._model_refusal)
