"""Restores the prompts of an engine's requests. The engine calls it at each step (`seams.Hooks`), in the thread of its steps.

Each step: note what the last step computed; admit requests whose chunks have been looked up; move fronts over what was loaded;
then decide whether a front gets the step, or the others do. Whatever goes wrong in here, the restore is abandoned, and its
request goes on plainly behind the chunks that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from cake_hf.model.plainly import ComputePlainly
from cake_hf.report import Refusal
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Outcome, Strategy
from cake_hf.serving.audit import EngineAudit
from cake_hf.serving.beliefs import Beliefs
from cake_hf.serving.fronts import Front, Fronts
from cake_hf.serving.ledger import Chunk, Ledger
from cake_hf.serving.loads import Loaders
from cake_hf.serving.requests import Requests
from cake_hf.serving.restore import Phase, Restore
from cake_hf.serving.seams import Engine, RequestState, Step
from cake_hf.serving.watcher import Watcher
from cake_hf.serving.windows import Windows
from cake_hf.transfer.telemetry import observe_step

CHANGED = Refusal(
    "model-changed", "the model was paused for, and may have been changed, while the prompt was being restored"
)
RESTARTED = Refusal("engine-restarted", "the engine was started anew")
NO_MEMORY = Refusal("engine-memory", "the engine has too little memory for the prompt")


Found = TypeVar("Found")


class Restorer(Watcher):
    """The hooks of one engine.

    Args:
        session: with model and store.
        engine: that calls this.
        requests: the requests of the manager.
        loaders: the loaders of the engine.
        windows: the windows of the engine's requests.
        audit: the audit of computed chunks, which it has saved.
        beliefs: about costs.
        stall: the share of steps that may be one restore's alone while requests decode.
        stepped_seconds: returns how long all steps so far took.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        session: Session,
        engine: Engine,
        requests: Requests,
        loaders: Loaders,
        windows: Windows,
        audit: EngineAudit,
        beliefs: Beliefs,
        *,
        stall: float,
        stepped_seconds: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(requests)
        self._session, self._engine = session, engine
        self._loaders, self._windows, self._audit, self._beliefs = loaders, windows, audit, beliefs
        self._stepped_seconds, self._clock = stepped_seconds, clock
        self._stepped = stepped_seconds()
        self._arrived = 0
        self._size = session.chunk_size
        self._solo = session.exact or engine.window > 0  # of a mixed step, a chunk's windows are not known
        self._fronts = Fronts(session, beliefs, stall)
        self._restoring: list[Restore] = []
        self._computing: dict[str, int] = {}
        self._held: list[Restore] = []
        self._stale: float | None = None

    # What the engine calls.

    def arrived(self, state: RequestState) -> None:
        """See `Hooks`."""
        self._arrived += 1
        super().arrived(state)

    def plan(self) -> Step:
        """See `Hooks`."""
        try:
            self._look_for_first_tokens()
            if self._stale is not None:
                self._start_anew(self._stale)
            return self._plan()
        except Exception as error:
            self._tell(error)
            for restore in self._requests.under_way():
                if restore.phase not in (Phase.LOOKING, Phase.OVER):
                    self._abandon(restore, _failed(error))
            return Step(hidden=self._hidden())

    def reset(self) -> None:
        """See `Hooks`."""
        super().reset()
        self._engine.canonical.clear()
        for restore in list(self._restoring):
            self._guarded(restore, partial(self._abandon, refusal=RESTARTED))

    # Other threads.

    def model_changed(self) -> None:
        """The model may have been changed: what is being restored is not taken further, and no KV of before is found."""
        self._stale = self._clock()

    # One step.

    def _plan(self) -> Step:
        self._note_step()
        self._admit_all()
        self._fronts.loading = sum(_ledger(restore).loads_left() > 0 for restore in self._restoring)
        self._fronts.decoding = self._engine.decodes()
        fronts = [front for restore in list(self._restoring) if (front := self._guarded(restore, self._advance))]
        hidden = self._hidden()
        tokens, requests = self._engine.queue(hidden)
        for restore in list(self._held):
            if not self._fronts.holds_back(restore, tokens, requests, self._clock()):
                self._let_go(restore, hidden)
        step = Step(hidden=hidden, let_go=self._let_go_all if self._held else None)
        if fronts:
            chosen, turn = self._fronts.choose(fronts, tokens, requests)
            if not self._solo:
                self._run_beside(chosen, step)
            elif turn:
                step.alone = self._run_alone(chosen)
            else:
                step.fallback = partial(self._guarded, chosen.restore, lambda _: self._run_alone(chosen))
        return step

    def _hidden(self) -> set[str]:
        names = [*self._engine.active(), *(state.request_id for state in self._engine.waiting())]
        known = ((name, self._requests.known(name)) for name in names)
        return {name for name, restore in known if restore is not None and restore.phase is not Phase.OVER}

    def _let_go(self, restore: Restore, hidden: set[str]) -> None:
        self._held.remove(restore)
        restore.over()
        hidden.discard(restore.request_id)

    def _let_go_all(self, step: Step) -> None:
        """Releases all requests that are held back, since the others have nothing to run."""
        for restore in list(self._held):
            self._let_go(restore, step.hidden)

    def _run_alone(self, front: Front) -> tuple[RequestState, int] | None:
        state = self._begin(front)
        return None if state is None else (state, self._computing[state.request_id] - state.position_offset)

    def _run_beside(self, front: Front, step: Step) -> None:
        state = self._begin(front)
        if state is not None:
            step.hidden.discard(state.request_id)
            step.last[state.request_id] = self._computing[state.request_id] - state.position_offset

    def _begin(self, front: Front) -> RequestState | None:
        restore, ledger = front.restore, _ledger(front.restore)
        if restore.request_id not in self._computing:
            if not ledger.begin():
                return None
            self._computing[restore.request_id] = (ledger.front + 1) * self._size
        return restore.state

    def _note_step(self) -> None:
        """Notes what the last step, if there was one since, has computed, and which requests have come."""
        stepped = self._stepped_seconds()
        took, self._stepped = stepped - self._stepped, stepped
        alone = [
            self._guarded(restore, partial(self._note_computed, seconds=took)) for restore in list(self._restoring)
        ]
        if not any(alone):
            self._fronts.traffic.worked(took)
        self._fronts.traffic.came(self._arrived, self._clock())
        self._arrived = 0

    def _note_computed(self, restore: Restore, seconds: float) -> bool:
        """Notes that the last step has computed the chunk at a front; returns whether it was that chunk's alone."""
        until, state, ledger = self._computing.get(restore.request_id), restore.state, _ledger(restore)
        if until is None or state is None:
            return False
        if state.position_offset < until:
            if self._solo:  # the step did not take place
                del self._computing[restore.request_id]
                ledger.put_back()
            return False
        del self._computing[restore.request_id]
        index, now = ledger.computed(), self._clock()
        restore.report.chunks_computed += not ledger.again
        restore.record("compute", index, now - seconds, now, "computed")
        if self._solo:  # else the step was not the chunk's alone
            observe_step("alone")
            restore.steps.append((index, seconds))
            self._beliefs.saw_chunk(index, seconds)
        self._engine.publish(state, until)
        windows = self._engine.seen_windows(self._size)
        if windows is None:
            restore.report.chunks_unsaved += restore.saves
        else:
            self._audit.computed(restore, index, windows)
        return self._solo

    def _advance(self, restore: Restore) -> Front | None:
        """Moves a front over what is there, unless the audit forbids it; returns it if it could go on by computing."""
        ledger, state, now = _ledger(restore), restore.state, self._clock()
        self._give_up_late(restore, now)
        if not self._audit.settle(restore) and ledger.is_there():
            return None
        at = ledger.advance()
        if state is not None and ledger.front * self._size > state.position_offset:
            self._windows.move(restore, state, ledger.front)
            self._engine.go_on_from(state, ledger.front * self._size)
            self._engine.publish(state, state.position_offset)
        if at is None:
            restore.ended = now
            self._finish(restore)
            if self._engine.masks:
                restore.phase = Phase.HELD
                self._held.append(restore)
            return None
        if at is not Chunk.COMPUTING and not self._fronts.may_compute(restore, at, now):
            restore.ready_since = None
            return None
        if restore.ready_since is None:
            restore.ready_since = now
        return self._fronts.front(restore, now)

    def _give_up_late(self, restore: Restore, now: float) -> None:
        for load in _ledger(restore).give_up_late(now - self._session.limits.read_timeout):
            self._loaders.leave(load)
            restore.outcomes[load.chunk] = Outcome.LATE
            restore.report.chunks_failed += 1
            restore.record("load", load.chunk, load.begun, now, Outcome.LATE.value)
            self._faults.tell(
                "late",
                "A stored chunk did not come in time and is computed instead: given up after %s s (Limits.read_timeout).",
                f"{self._session.limits.read_timeout:g}",
            )

    # Beginning and end of a restore.

    def _admit_all(self) -> None:
        for state in self._engine.waiting():
            restore = self._requests.known(state.request_id)
            if restore is None or restore.phase is not Phase.WAITING or self._is_made_by_another(restore):
                continue
            if self._guarded(restore, partial(self._admit, state)) is False:
                break  # the next one must not take the memory that this one waits for

    def _is_made_by_another(self, restore: Restore) -> bool:
        """Returns whether another request is restoring chunks just now that this one will then find in memory."""
        return self._engine.shares and any(
            _ledger(other).front < restore.shared_with(other) for other in self._restoring
        )

    def _admit(self, state: RequestState, restore: Restore) -> bool:
        """Gives a request all blocks of its prompt, so that each chunk has its place; False if it has to wait for them."""
        engine, exact = self._engine, self._session.exact
        there = engine.adopt(state, self._size, restore.chunks, exact=exact)
        alone = not engine.active()
        if not engine.reserve(state, alone=alone):
            if there:
                engine.disown(state)
            if alone:
                self._abandon(restore, NO_MEMORY)
            return alone
        engine.admit(state)
        loads = self._session.strategy is not Strategy.COMPUTE
        loaded = [has and loads for has in restore.stored]
        restore.ledger = Ledger(loaded, self._clock, self._windows.loads(loaded))
        restore.ledger.skip(there)
        restore.report.chunks_shared += there
        restore.began = self._clock()
        restore.arrivals.append(restore.began)
        restore.phase = Phase.RESTORING
        self._restoring.append(restore)
        if len(self._restoring) > 1:
            for one in self._restoring:
                one.crowded = True
        self._loaders.serve(self._restoring)
        return True

    def _finish(self, restore: Restore) -> None:
        """Ends a restore; the engine goes on with the request."""
        if restore.ledger is not None:
            restore.ledger.end()
        restore.over()
        restore.windows.clear()
        self._audit.end(restore)
        self._computing.pop(restore.request_id, None)
        if restore in self._held:
            self._held.remove(restore)
        if restore in self._restoring:
            self._restoring.remove(restore)
            self._loaders.serve(self._restoring)

    def _abandon(self, restore: Restore, refusal: Refusal) -> None:
        restore.report.explain(refusal)
        self._finish(restore)

    def _start_anew(self, changed: float) -> None:
        self._stale = None
        self._engine.forget_content()
        for restore in self._requests.under_way():
            if restore.phase is not Phase.OVER and restore.started <= changed:
                self._abandon(restore, CHANGED)

    # Faults.

    def _guarded(self, restore: Restore, step: Callable[[Restore], Found]) -> Found | None:
        """Does one step of one restore; if it fails, that restore is abandoned, and no other."""
        try:
            return step(restore)
        except ComputePlainly as because:
            self._tell(because)
            self._abandon(restore, because.refusal)
            return None
        except Exception as error:
            self._tell(error)
            self._abandon(restore, _failed(error))
            return None


def _failed(error: Exception) -> Refusal:
    text = f"the restore has failed and was abandoned ({type(error).__name__}: {error})"
    return Refusal("restore-failed", text)


def _ledger(restore: Restore) -> Ledger:
    assert restore.ledger is not None
    return restore.ledger
