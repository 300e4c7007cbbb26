"""The restore of one prompt: the main thread computes from the front, loaders read from the back, until they meet.

The steps, in the order in which they happen:

1. `prompt_cache.PromptCache._handle` finds which part of a call is a prompt, and whether it is to be restored.
2. `prompt.open_prompt` gives keys to the prompt's blocks, and `match_prefix` there asks the store which of them it has (a
   `PrefixMatch`).
3. `plan.plan_restore` decides which of the stored chunks are loaded, and how (a `RestorePlan`).
4. `Restore`, in this file: the layers reserve room, loaders claim chunks from the back (`transfer.loader`), and the walk goes
   up from the front. The frontier decides what comes next (`scheduling.frontier`); `forwards.ChunkRuns` runs the model on
   it, and has it saved.
5. The sides meet: the length is set to all chunks. The caller of the model then runs the prompt's suffix. The suffix may start
   while the last loads still arrive: each of its layers waits for that layer of the loads (`await_layer`).
6. `close` waits for the loaders, and `pacing.count_restore` adds to the report what happened. Or `abandon` restores the
   previous state.

If the model carries something from chunk to chunk (sliding windows, recurrent states; see `carried`), the steps are the same,
but the model can continue only where it stands: a chunk after loaded ones runs once the windows and the state before it are put
in.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import torch

from cake_hf.chunks.codec import stored_bytes
from cake_hf.layers import HEADROOM_TOKENS, TokenMajorLayer
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.model.kv_layout import kv_template, layers_with_tokens
from cake_hf.model.look import devices_of
from cake_hf.model.ranks import ranks_of
from cake_hf.restore.audit import Audit
from cake_hf.restore.carried import Carried, StoredStates, WindowBuffers, Windows
from cake_hf.restore.forwards import ChunkRuns, Forward, LossySchedule, Progress
from cake_hf.restore.pacing import HurriedPace, count_restore, deadline_of, new_frontier, new_pace, steps_for
from cake_hf.restore.plan import plan_restore
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.refining import Refining
from cake_hf.restore.saving import Flights, Saver
from cake_hf.restore.session import Session
from cake_hf.scheduling.costs import Brought
from cake_hf.scheduling.frontier import Outcome
from cake_hf.scheduling.layer_gate import LayerGate
from cake_hf.transfer.copy_streams import let_copies_out_end
from cake_hf.transfer.deadline import wait_budget
from cake_hf.transfer.landing import place_for
from cake_hf.transfer.loader import LoadJob, start_loaders


class Restore:
    """Brings the KV of the prompt's full chunks into the layers; after `close`, these hold exactly that many tokens more.

    Use: `start`; `run`; then the prompt's suffix, with `await_layer` in each layer; then `close`. If anything fails, `abandon`.

    Args:
        session: of the cache.
        layers: of the cache, all at the call's past length.
        prompt: from `open_prompt`.
        forward: runs the model on one chunk with the cache, see `forwards.Forward`.
        progress: called from time to time with (chunks that are there, all chunks).
        past_loads: whether a forward that follows loads may start before these have all arrived.
        max_ttft: seconds after the call within which the first token should be there; None to load all chunks whole.

    Attributes:
        prompt: as given.
        cost_memory: the costs that decisions rest on, and to which the measured ones are added.
        pace: of this restore.
        brought: the number of chunks that were not computed; set by `close`.
        pending: loads may be under way that layers have to wait for.
    """

    def __init__(
        self,
        session: Session,
        layers: list[Any],
        prompt: Prompt,
        forward: Forward,
        progress: Progress,
        *,
        past_loads: bool,
        max_ttft: float | None = None,
    ) -> None:
        self.prompt = prompt
        self.brought = 0
        self.pending = True
        self._session = session
        self._progress = progress
        self._end = prompt.call.past + prompt.call.tokens
        self._threads: list[threading.Thread] = []
        self._made = 0  # the devices' next work sees all chunks before this one
        template = kv_template(session.model)
        kept = [
            (layers[number], template[number])
            for number in layers_with_tokens(template)
            if isinstance(layers[number], TokenMajorLayer)
        ]
        self._layers = [layer for layer, _ in kept]  # those that keep each token
        self._states = StoredStates(session, prompt)
        self._carried = Carried(
            layers,
            template,
            prompt.blocks,
            prompt.call.past,
            prompt.state_layout,
            self._loaded_block,
            self._states.get,
        )
        self._audit = Audit(session, prompt)
        self._saver = Saver(session, self._layers, prompt, self._carried, self._states, self._audit)
        self._lossy = LossySchedule(session.bound_store.lossy, prompt, self._saver.pieces)
        self._ranks = ranks_of(session.model)
        self.cost_memory = session.cost_memory(prompt.namespace)
        deadline = deadline_of(session, prompt, max_ttft)
        costs = self.cost_memory.costs(None if deadline is None else stored_bytes(prompt.layout))
        by_layers = past_loads and not self._carried and self._ranks is None and deadline is None
        self._plan = plan = plan_restore(session, prompt, costs, self._carried.reach, by_layers=by_layers)
        self._windows = WindowBuffers(prompt, plan.windows, template)
        self._reserve(kept)  # the last step that takes memory: a failure before it has nothing to release
        past = prompt.call.past
        # The targets of loads: one per piece of the layout, each on the device of its layer.
        buffers = [buffer[:, past:] for layer in self._layers for buffer in layer.buffers] + self._windows.buffers
        if not plan.loads:
            buffers = []  # they may be head-major, which no chunk is
        self.pace = new_pace(
            session,
            prompt,
            plan,
            self.cost_memory,
            costs,
            deadline=deadline,
            layers=len(layers),
            can_run=self._can_run,
            can_leave=self._can_leave,
        )
        self._waits = wait_budget()
        self._read_timeout = self._waits.grant(session.limits.read_timeout)
        self._frontier = new_frontier(session, plan, self.pace, self._read_timeout)
        self._gate = LayerGate(self._frontier, last=session.limits.loader_threads, ranges=plan.ranges)
        self._steps = steps_for(self._frontier, self._ranks)
        self._job = self._load_job(buffers)
        # A chunk taken from another restore comes without the state after it, and is missing on the other ranks.
        alone = bool(self._carried) or self._ranks is not None
        self._flights = Flights(session, prompt, self._job, self._frontier, self._saver, alone=alone)
        self._runs = ChunkRuns(
            prompt,
            layers,
            self._layers,
            forward,
            self._carried,
            self._frontier,
            self._steps,
            self.pace,
            self._saver,
            self._lossy,
            self._audit,
            devices_of(session.model),
        )

    def start(self) -> None:
        """Starts the loads."""
        self._carried.start()
        if self._plan.loads:
            if self._plan.state is not None:
                self._states.begin(self._plan.state)
            self._threads = start_loaders(self._job, self._session.limits.loader_threads)

    def run(self) -> None:
        """Computes until the two sides have met, or only loads are left that the layers can wait for.

        Raises:
            ComputePlainly: the model does not compute what the store holds.
        """
        prompt = self.prompt
        self._walk(prompt.chunks, past_loads=self._gate.is_open)
        if isinstance(self.pace, HurriedPace) and not self._carried:
            Refining(self._job, self.pace, self._session.limits, self._saver.pieces).run()
        self.pending = self._gate.beyond > 0
        self._audit.settle()
        self._audit.end()  # from now on the suffix is in the model
        self._progress(prompt.chunks, prompt.chunks)

    def await_layer(self, layer: int) -> None:
        """Returns once that layer of all chunks before the piece that is in the model is in the layers' buffers."""
        self._job.commit_staged()  # frees the staged memory for other loads
        if not self._gate.beyond:
            return
        self._runs.waited = True
        self._gate.await_layer(layer, partial(self._job.commit_layer, layer), self._make_within)
        self._job.place.catch_up()

    def close(self, *, save_suffix: bool = False) -> None:
        """Ends the restore after the prompt's suffix has run, or if it will not run.

        Waits for the loaders, unless a load was left behind.

        Args:
            save_suffix: the suffix is a block of the canonical schedule, to be saved like the others.
        """
        self.pace.end(time.monotonic())
        try:
            self._settle_in()
            self._job.place.catch_up()
            # Loaders that wait for other prompts' reads are no longer needed.
            self._frontier.close()
            self._session.bound_store.sharing.wake()
            if not self._frontier.left_behind():
                for thread in self._threads:
                    thread.join()
            self._job.let_go()
            self._states.let_go()
            self.brought = self._count()
            self.prompt.report.tokens_lossy += self._lossy.tokens(self.prompt.chunks + save_suffix)
            if save_suffix and self.exact_blocks(self.prompt.chunks + 1) > self.prompt.chunks:
                self._carried.begin()
                self._carried.ran()
                self._carried.passed(self.prompt.chunks)
                coded = self._lossy.code(self.prompt.chunks)
                self._saver.chunk(self.prompt.chunks, coded=coded)
                self._saver.state(self.prompt.chunks)
        finally:
            let_copies_out_end()
            self._carried.end()

    def abandon(self) -> None:
        """Returns the layers to their content before the call, after a failure. No loader writes to them any more."""
        self._audit.end()
        self.pace.end(time.monotonic())
        if self.prompt.inquiry is not None:
            self.prompt.inquiry.give_up()
        self._frontier.stop()
        self._job.let_go()
        self._job.place.catch_up()
        self._states.let_go()
        let_copies_out_end()
        try:
            self._go_back(late_reads=self._plan.loads and self._job.place.is_read_into)
            self._carried.go_back()
        finally:
            self._carried.end()

    @property
    def took(self) -> dict[int, Brought]:
        """What was brought for each chunk that was read so far."""
        return dict(self._job.took)  # late loads may still add to it

    def exact_blocks(self, count: int) -> int:
        """Returns how many of the first `count` blocks are exact: those before the first one that is rounded.

        All later ones may have seen rounded KV, and belong to no key.
        """
        until = self._frontier.exact_until()
        return count if until == self.prompt.chunks else until

    @property
    def waited(self) -> bool:
        """Whether the piece that was last in the model waited for loads in its layers."""
        return self._runs.waited

    # The main thread's work.

    def _reserve(self, kept: list[tuple[TokenMajorLayer, Any]]) -> None:
        """Reserves room for the prompt in the layers that keep each token; if the device has too little, reserves nothing."""
        try:
            for layer, one in kept:
                layer.make_room(one, self._end + HEADROOM_TOKENS, head_major=not self._plan.loads)
        except BaseException:
            for layer in self._layers:
                if not self.prompt.call.past:
                    layer.reset()
            raise

    def _go_back(self, *, late_reads: bool) -> None:
        past = self.prompt.call.past
        for layer in self._layers:
            if not past:
                layer.reset()
            elif late_reads:
                # Loads under way may still write to these buffers: use others, as small as possible, since memory may be short.
                layer.move_out(past, capacity=past)
            else:
                layer.show(past)

    def _walk(self, until: int, *, past_loads: bool) -> None:
        """Computes, or takes from the loaders, all chunks before `until`, and makes them the content of the layers."""
        while (index := self._steps.advance(until=until, past_loads=past_loads)) is not None:
            self._gate.went_to(index)
            self._settle_in()
            self._see(index)
            with self._flights.flight(index) as plan:
                if plan.followed is not None and self._flights.take_over(index, plan.followed):
                    self._made = index + 1
                    continue
                if self._runs.compute(index):
                    self._made = index + 1
                    self._flights.hand_out(index, plan)
            self._progress(index + 1, self.prompt.chunks)
        self._gate.went_to(until)
        self._settle_in()
        self._job.place.catch_up()
        self._runs.waited = False
        self._runs.stand(until)
        self._runs.show(until)

    def _make_within(self, until: int) -> None:
        """Makes all chunks before `until` in the middle of the forward on the piece after them, which then continues."""
        lengths = [held.lengths for held in self._layers]
        self._walk(until, past_loads=False)
        self._runs.waited = True
        for held, length in zip(self._layers, lengths, strict=True):
            held.show_lengths(length)

    def _loaded_block(self, index: int) -> Windows | None:
        loaded = self._frontier.outcomes().get(index) is Outcome.LOADED
        return self._windows.block(index) if loaded else None

    def _settle_in(self) -> None:
        """Commits what is staged. If late reads may still write to the buffers, the layers then move to other ones.

        Nothing arrives after that: giving up one load ends all loading.
        """
        self._job.commit_staged()
        if self._frontier.take_abandoned():
            self._waits.spend(self._read_timeout)
            self._job.drop_late()
            if self._job.place.is_read_into:
                for layer in self._layers:
                    layer.move_out(self._end)

    def _see(self, index: int) -> None:
        """Has the devices wait, before they compute a chunk, for copies to the memory that this chunk reads or writes.

        Usually there are none: the copies under way go to the back of the prompt.
        """
        if index != self._made or self._carried or not self._frontier.is_untouched(index):
            self._job.place.catch_up()

    def _can_run(self, index: int) -> bool:
        """False if the model stands elsewhere: chunks that are already loaded would have to run again for what they carry."""
        return not self._carried or self._carried.standing == index

    def _can_leave(self, index: int) -> bool:
        """False if the model carries something, which would be half done, or if other ranks are in the same forward."""
        return index in self.prompt.full and not self._carried and self._ranks is None

    def _load_job(self, buffers: list[torch.Tensor]) -> LoadJob:
        limits, lossy = self._session.limits, self._session.bound_store.lossy is not None
        encodes = self._session.bound_store.encodes(self.prompt.namespace, self.prompt.layout)
        rooms = limits.device_decode_bytes // max(1, self.prompt.layout.nbytes) if encodes and not lossy else 0
        return LoadJob(
            store=self._session.bound_store.store,
            keys=self.prompt.keys,
            layout=self.prompt.layout,
            place=place_for(
                buffers,
                self.prompt.layout,
                STAGED_PER_THREAD * limits.loader_threads,
                self._plan.windows,
                [(block.start, block.end) for block in self.prompt.blocks],
                min(rooms, limits.loader_threads),
            ),
            frontier=self._frontier,
            record=self.prompt.recorder(),
            clock=time.monotonic,
            sharing=self._session.bound_store.sharing,
            most_reads=limits.loader_threads,
            patience=limits.read_timeout,
            gate=self._gate,
            encodes=encodes,
            lossy=lossy,
        )

    def _count(self) -> int:
        outcomes, patience = self._frontier.outcomes(), self._read_timeout
        flown, states = self._flights.shared, len(self._states.loaded)
        return count_restore(self.prompt, outcomes, self._steps.overruled, self._job, flown, states, patience)
