"""Everything that is private in transformers' continuous batching, and that we depend on. No other file names any of it.

The engine keeps KV in *blocks* of `page_size` tokens over all layers, `[L0 K | L0 V | L1 K | ...]`, each part token-major. That
is the order of a chunk's payload, so a chunk is `chunk_size / page_size` blocks, part by part. Layers with a sliding window
have blocks of their own, a ring per request, in which a token is at its position modulo the window. What the engine finds in
its own memory (`search_prefix_match`) moves a request's `position_offset` up and cuts `remaining_prefill_tokens`; a restore
ends the same way. Tried with transformers 5.20, 5.23 and 5.24.
"""

from __future__ import annotations

import copy
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, SLIDING_ATTENTION
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import WorkloadHints

from cake_hf.serving.support import default_share

__all__ = [
    "Engine",
    "EngineManager",
    "Hooks",
    "RequestState",
    "Step",
    "complete_config",
    "generation_config_of",
    "hints_for",
    "lend_to",
    "no_room",
]


@dataclass
class Step:
    """What the engine does in its next step.

    Attributes:
        hidden: requests that are left out, by id.
        alone: a request that runs alone, with this many tokens; None for a step of the others.
        fallback: returns what runs alone if the others have nothing to run after all; None for nothing.
        let_go: called if the others have nothing to run after all; it takes requests out of `hidden`. None for nothing.
        last: requests that get what the others leave of the step, up to this many tokens each, by id.
    """

    hidden: set[str] = field(default_factory=set)
    alone: tuple[RequestState, int] | None = None
    fallback: Callable[[], tuple[RequestState, int] | None] | None = None
    let_go: Callable[[Step], None] | None = None
    last: dict[str, int] = field(default_factory=dict)


class Hooks(Protocol):
    """What the engine calls, in the thread of its steps; none of it raises, or waits."""

    def arrived(self, state: RequestState) -> None:
        """A request has come to the scheduler, for the first time or again."""

    def ended(self, request_id: str) -> None:
        """A request's blocks are about to be freed: it is done, was cancelled, or has to start again."""

    def plan(self) -> Step:
        """Returns what the next step is."""

    def reset(self) -> None:
        """All requests are forgotten."""


class Engine:
    """The scheduler and the memory of one batch processor.

    Attributes:
        page: tokens of a block.
        canonical: blocks whose KV is known to be as `generate` computes it.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._cache = processor.cache
        self._scheduler = processor.scheduler
        self._allocators = self._cache.cache_allocators
        self._ring = self._allocators.get(SLIDING_ATTENTION)
        self._allocator = self._allocators.get(FULL_ATTENTION, self._ring)
        self.page: int = self._allocator.tokens_per_page
        self.canonical: set[int] = set()
        self._seen: list[torch.Tensor] | None = None
        self._watch_blocks()
        if self._ring is not None:
            self._watch_windows()
        self._leave_config_alone()

    def _leave_config_alone(self) -> None:
        """Keeps a step from changing the model's config while it runs.

        With a mask, the engine passes `is_causal=False`, which attention ignores, but transformers puts it into the config
        until the forward ends. Any other forward in that time, in another thread, would attend to later tokens.
        """
        outputs = self._processor.inputs_and_outputs
        arguments = outputs.get_model_kwargs

        def get_model_kwargs(*args: Any, **kwargs: Any) -> Any:
            found = arguments(*args, **kwargs)
            if found.get("attention_mask") is not None and found.get("is_causal") is False:
                del found["is_causal"]
            return found

        outputs.get_model_kwargs = get_model_kwargs

    def _watch_blocks(self) -> None:
        """A block that is handed out again is no longer canonical."""
        pool, hand_out = self._cache.pool, self._cache.pool.get_free_blocks

        def get_free_blocks(index: int, count: int) -> list[int]:
            blocks: list[int] = hand_out(index, count)
            self.canonical.difference_update(blocks)
            return blocks

        pool.get_free_blocks = get_free_blocks

    def _watch_windows(self) -> None:
        """Has layers with a window, which soon overwrite it, show what a step gives them; see `see_windows`."""
        update = self._ring.update

        def watched(keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> Any:
            if self._seen is not None:
                self._seen += keys, values
            return update(keys, values, *rest)

        self._ring.update = watched

    # Requests.

    def waiting(self) -> list[RequestState]:
        """Returns the requests that may be admitted now, oldest first."""
        scheduler = self._scheduler
        if scheduler.block_new_requests:
            return []
        waiting = (scheduler.waiting_requests.get(name) for name in list(scheduler.waiting_requests_order))
        return [state for state in waiting if state is not None and not state.is_cpu_offloaded]

    def active(self) -> dict[str, RequestState]:
        """Returns the admitted requests by id."""
        found: dict[str, RequestState] = self._scheduler.active_requests
        return found

    def admit(self, state: RequestState) -> None:
        """Makes a waiting request an active one that is being prefilled."""
        scheduler = self._scheduler
        scheduler.active_requests[state.request_id] = scheduler.waiting_requests.pop(state.request_id)
        scheduler.waiting_requests_order.remove(state.request_id)
        state.status = RequestStatus.PREFILLING

    def decodes(self) -> bool:
        """Returns whether any request is decoding."""
        return any(state.status == RequestStatus.DECODING for state in self.active().values())

    def queue(self, hidden: set[str]) -> tuple[int, int]:
        """Returns the tokens and the number of the requests that wait for prefill.

        Args:
            hidden: requests that do not count.
        """
        tokens = requests = 0
        active = [state for name, state in self.active().items() if name not in hidden]
        for state in (*active, *(state for state in self.waiting() if state.request_id not in hidden)):
            if state.status != RequestStatus.DECODING:
                tokens, requests = tokens + len(state.remaining_prefill_tokens), requests + 1
        return tokens, requests

    @staticmethod
    def go_on_from(state: RequestState, position: int) -> None:
        """Has a request go on behind KV that is there, as after a prefix match in memory."""
        state.position_offset = position
        state.remaining_prefill_tokens = state.initial_tokens[position:]

    # Memory.

    @property
    def window(self) -> int:
        """Tokens of the sliding window of the layers that have one; 0 if none has."""
        return 0 if self._ring is None else int(self._ring.sliding_window)

    @property
    def windowed_layers(self) -> list[int]:
        """The layers that have a sliding window."""
        return [] if self._ring is None else list(self._ring.layer_indices)

    @property
    def room(self) -> int | None:
        """How many tokens of one request the memory holds; None if it holds any number, since all layers have windows."""
        sectors = int(self._cache.num_sectors)
        most = sectors * max(one.blocks_per_sector for one in self._allocators.values()) * self.page + 1
        room = bisect_right(range(most), sectors, key=self._sectors) - 1
        return None if self._allocator is self._ring and room >= self.window else room

    def _sectors(self, tokens: int) -> int:
        """Returns how many sectors of memory a request of that many tokens takes."""
        blocks = ((one, one._compute_blocks_needed(0, 0, tokens)) for one in self._allocators.values())
        return sum(-(-count // one.blocks_per_sector) for one, count in blocks)

    def fit(self, state: RequestState) -> None:
        """Has a request's answer end where the memory does. A request that outgrows it would end the engine.

        Raises:
            ValueError: not even the prompt has room.
        """
        if self.room is None:
            return
        left = self.room - len(state.initial_tokens)
        if left <= 0:
            raise ValueError(no_room(len(state.initial_tokens), self.room))
        if state.max_new_tokens is None or state.max_new_tokens > left:
            state.max_new_tokens = state._new_tokens_limit = left

    @property
    def ranks(self) -> int:
        """Number of processes that compute the model together."""
        return int(self._processor.distributed_helper.tp_size)

    @property
    def masks(self) -> bool:
        """Whether attention is over a mask: each token of a step is compared with the KV of all its requests."""
        return self._processor.inputs_and_outputs.attention_mask is not None

    @property
    def shares(self) -> bool:
        """Whether requests share blocks with equal content."""
        return bool(self._cache.use_prefix_sharing)

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step."""
        return int(self._cache.max_batch_tokens)

    @property
    def block_bytes(self) -> tuple[int, int]:
        """Bytes of a block: of layers that keep all tokens, and of layers with a window."""
        full = 0 if self._allocator is self._ring else int(self._allocator.bytes_per_block)
        return full, 0 if self._ring is None else int(self._ring.bytes_per_block)

    def between_steps(self) -> AbstractContextManager[object]:
        """Orders what the caller starts on a GPU: behind the steps so far, and before the next one.

        Steps run in a stream of their own, which waits for no other one by itself.
        """
        stream = self._processor.inputs_and_outputs.compute_stream
        return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else nullcontext()

    def metadata(self) -> dict[str, Any]:
        """Returns what of the engine may change how KV rounds."""
        config = self._processor.cb_config
        return {
            "page_size": self.page,
            "padding": bool(self._processor.model_runner.pad_inputs),
            "graphs": str(config.use_cuda_graph),
            "compiled": str(config.varlen_compile_config),
            "tokens": self.step_tokens,
            "memory": int(self._cache.max_tokens_read),
        }

    def account(self) -> dict[str, int]:
        """Returns the bytes of memory: all; free; in requests' tables; and kept only since they may be found again."""
        pool, size = self._cache.pool, int(self._cache.bytes_per_sector)
        found = {"all": int(self._cache.num_sectors) * size, "free": len(pool.free_sectors) * size}
        for one in self._allocators.values():
            tables = {block for table in one.block_table.values() for block in table}
            counts = {
                "free": pool.count_free_blocks(one.index),
                "tables": len(tables),
                "cached": len(one.ledger.cached_blocks),
            }
            for kind, count in counts.items():
                found[kind] = found.get(kind, 0) + count * int(one.bytes_per_block)
        return found

    def reserve(self, state: RequestState, *, alone: bool) -> bool:
        """Gives a request all blocks of its prompt; False, without any effect, if they are not free.

        Args:
            state: of a waiting request.
            alone: no request is active, so that no margin has to be left for what these decode.
        """
        tokens = len(state.remaining_prefill_tokens)
        self._cache.pool.try_to_free_sectors()
        if not self._has_room(state, tokens, alone=alone):
            if not self._cache.evict_cached_blocks():
                return False
            self._cache.pool.try_to_free_sectors()
            if not self._has_room(state, tokens, alone=alone):
                return False
        return bool(self._cache.can_store_request_tokens(state, tokens))

    def _has_room(self, state: RequestState, tokens: int, *, alone: bool) -> bool:
        if not self._cache.can_store_request_tokens(state, tokens, dry_run=True):
            return False
        if alone:
            return True
        needed = sum(
            one.needs_new_blocks(state.request_id, state.position_offset, tokens) * one.bytes_per_block
            for one in self._allocators.values()
        )
        whole = self._cache.num_sectors * self._cache.bytes_per_sector
        left = self._cache.compute_free_capacity(relative=False) - needed
        return bool(left >= self._scheduler.safety_margin * whole)

    def adopt(self, state: RequestState, tokens_per_chunk: int, most: int, *, exact: bool) -> int:
        """Shares with a waiting request the chunks of its prompt that are in memory; returns their number.

        Args:
            tokens_per_chunk: size of a chunk.
            most: number of chunks.
            exact: take only KV that is known to be as `generate` computes it.
        """
        if not self.shares:
            return 0
        per_chunk = tokens_per_chunk // self.page
        blocks = self._allocator.match_prefix_blocks(state.initial_tokens)[: most * per_chunk]
        if exact:
            strange = (number for number, block in enumerate(blocks) if block not in self.canonical)
            blocks = blocks[: next(strange, len(blocks))]
        chunks = len(blocks) // per_chunk
        if chunks:
            self._allocator.acquire_prefix_blocks(
                state.request_id, chunks * tokens_per_chunk, blocks[: chunks * per_chunk]
            )
            self.go_on_from(state, chunks * tokens_per_chunk)
        return chunks

    def disown(self, state: RequestState) -> None:
        """Takes back what `adopt` gave to a request that stays a waiting one."""
        self._cache.free_blocks(state.request_id)
        self.go_on_from(state, 0)

    def publish(self, state: RequestState, tokens: int) -> None:
        """Has other requests find the first `tokens` tokens' KV of a request, which are whole blocks of canonical KV.

        Blocks with the same tokens that were computed in company, and may round differently, are found no more.
        """
        if not self.shares:
            return
        ledger, table, parent = self._allocator.ledger, self._allocator.block_table[state.request_id], None
        for number in range(tokens // self.page):
            block, known = table[number], ledger.block_to_hash.get(table[number])
            if known is None:
                known = compute_block_hash(parent, state.initial_tokens[number * self.page : (number + 1) * self.page])
                other = ledger.hash_to_block.get(known)
                if other is not None and other not in self.canonical:
                    self._hide(other)
                    other = None
                if other is None:
                    ledger.register_new_hash(block, known)
                    self.canonical.add(block)
                else:
                    ledger.acquire(other)
                    table[number] = other
                    if ledger.release(block):
                        self._cache.pool.free_blocks(self._allocator.index, [block])
            parent = known

    def _hide(self, block: int) -> None:
        ledger = self._allocator.ledger
        ledger.hash_to_block.pop(ledger.block_to_hash.pop(block))
        if block in ledger.cached_blocks:
            ledger.cached_blocks.pop(block)
            self._cache.pool.free_blocks(self._allocator.index, [block])

    def forget_content(self) -> None:
        """No request finds any KV that is in memory now: the model may have changed."""
        self.canonical.clear()
        for block in list(self._allocator.ledger.block_to_hash):
            self._hide(block)

    def parts(self, request_id: str, start: int, tokens: int, pieces: int) -> list[torch.Tensor]:
        """Returns views of the memory of a request's tokens in layers that keep all: per block `[pieces, bytes]` uint8.

        Args:
            start: first token; the start of a block.
            tokens: number of tokens; whole blocks.
            pieces: how many parts a block has: the keys, and the values, of each such layer; 0 if there are none.
        """
        if not pieces:
            return []
        first, last = start // self.page, (start + tokens) // self.page
        blocks = self._allocator.block_table[request_id][first:last]
        return [self._allocator._copy_view[block].view(pieces, -1) for block in blocks]

    def see_windows(self, *, on: bool) -> None:
        """Begins or ends to keep what layers with a window are given in a step."""
        self._seen = [] if on and self._ring is not None else None

    def seen_windows(self, tokens: int) -> list[torch.Tensor] | None:
        """Returns what the step under `see_windows` has given to the layers with a window: keys and values of each layer,
        `[tokens, heads, head_dim]`. None if that was not seen, as in a step that is replayed from a graph.
        """
        seen = self._seen or []
        complete = len(seen) == 2 * len(self.windowed_layers)
        return [one[:tokens] for one in seen] if complete else None

    def put_windows(self, state: RequestState, position: int, pieces: Sequence[torch.Tensor]) -> None:
        """Sets consecutive tokens of a request, of the layers with a window.

        Args:
            position: the position of the first token.
            pieces: keys and values of each such layer, `[tokens, heads, head_dim]`; less tokens than a window.
        """
        slots = self._ring.get_write_indices(state.request_id, position, len(pieces[0]))
        memory = [view for layer in self.windowed_layers for view in self._ring._kv_token_views[layer]]
        index = torch.tensor(slots, device=memory[0].device)
        with torch.inference_mode():
            for view, piece in zip(memory, pieces, strict=True):
                view.index_copy_(0, index, piece.to(view.device))

    def run_alone(self, model: Any, state: RequestState, tokens: int) -> None:
        """Runs the next tokens of a request that no scheduler knows, as a step of its own; for trials before the first step."""
        state.tokens_to_process = state.initial_tokens[state.position_offset :][:tokens]
        past = state.position_offset
        state.remaining_prefill_tokens = state.initial_tokens[past + tokens :]
        if not self._cache.can_store_request_tokens(state, tokens):
            raise MemoryError("no room for a trial")
        runner, outputs = self._processor.model_runner, self._processor.inputs_and_outputs
        padded, read = runner.maybe_pad_inputs(num_q_tokens=tokens, max_kv_read=past, use_decode_fast_path=False)
        outputs.prepare_batch_tensors(
            requests_in_batch=[FutureRequestState(state, False, {}, tokens)],
            logits_processors=self._processor.logit_processor,
            use_decode_fast_path=False,
            num_q_tokens=padded,
            max_kv_read=read,
            use_padding=runner.pad_inputs,
        )
        self._processor._generation_step(model)

    def free(self, request_id: str) -> None:
        """Frees the blocks of a request of `run_alone`."""
        self._cache.free_blocks(request_id, no_cache=True)


class _Restoring:
    """What a scheduler of the engine does in addition. Without hooks it is the scheduler that it is mixed into."""

    hooks: Hooks | None = None
    engine: Engine | None = None
    _step = Step()

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]  # of the scheduler
        if self.hooks is not None:
            self.hooks.reset()

    def add_waiting_request(self, state: RequestState) -> None:
        if self.hooks is not None:
            self.hooks.arrived(state)
        try:
            if self.engine is not None:
                self.engine.fit(state)
        except ValueError:  # the engine fails this request, and goes on
            if self.hooks is not None:
                self.hooks.ended(state.request_id)
            raise
        super().add_waiting_request(state)  # type: ignore[misc]

    def finish_request(self, request_id: str) -> None:
        if self.hooks is not None:
            self.hooks.ended(request_id)
        super().finish_request(request_id)  # type: ignore[misc]

    def clear_cancelled_requests(self) -> Any:
        if self.hooks is not None:
            for request_id in list(self._requests_to_cancel):  # type: ignore[attr-defined]
                self.hooks.ended(request_id)
        return super().clear_cancelled_requests()  # type: ignore[misc]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        if self.hooks is None:
            return super().schedule_batch(token_budget, cache_budget)  # type: ignore[misc]
        with nullcontext() if self.engine is None else self.engine.between_steps():
            self._step = step = self.hooks.plan()
        if self.engine is not None:
            self.engine.see_windows(on=False)
        if step.alone is not None:
            scheduled = self._alone(*step.alone, cache_budget)
            if scheduled[0]:
                return scheduled
        planned = super().schedule_batch(token_budget, cache_budget)  # type: ignore[misc]
        if planned[0] or self.starved_requests:  # type: ignore[attr-defined]
            return planned
        instead = step.fallback() if step.fallback is not None else None
        if instead is not None:
            return self._alone(*instead, cache_budget)
        if step.let_go is not None:
            step.let_go(step)
            planned = super().schedule_batch(token_budget, cache_budget)  # type: ignore[misc]
            if planned[0] or self.starved_requests:  # type: ignore[attr-defined]
                return planned
        if planned[0] is None and not step.hidden.isdisjoint(self.active_requests):  # type: ignore[attr-defined]
            return [], planned[1], 0, 0  # a restore has the memory, and goes on; nothing need be offloaded
        return planned

    def _alone(self, state: RequestState, tokens: int, cache_budget: int) -> Any:
        batch, _, fast, queries, read = super()._process_candidates([state], tokens, cache_budget, set())  # type: ignore[misc]
        for future in batch:
            future.complete_blocks = {}  # `Engine.publish` sees to them
        if self.engine is not None:
            self.engine.see_windows(on=True)
        return batch, fast, queries, read

    def _process_candidates(self, candidates: list[RequestState], *budgets: Any) -> Any:
        step = self._step
        shown = [state for state in candidates if state.request_id not in step.hidden]
        shown.sort(key=lambda state: state.request_id in step.last)
        return super()._process_candidates(shown, *budgets)  # type: ignore[misc]

    def _schedule_request(self, state: RequestState, tokens: Sequence[int], budget: int, *rest: Any) -> None:
        budget = min(budget, self._step.last.get(state.request_id, budget))
        super()._schedule_request(state, tokens, budget, *rest)  # type: ignore[misc]


def no_room(tokens: int, room: int) -> str:
    """Returns what to say of a prompt that does not fit into an engine's memory, both in tokens."""
    return (
        f"The prompt has {tokens} tokens, and the engine's memory has room for {room}: raise num_blocks in the "
        "ContinuousBatchingConfig, or shorten the prompt."
    )


def _scheduler_for(name: str) -> str:
    """Returns the name of a scheduler like the one of that name, which also restores."""
    ours = f"cake_hf {name}"
    if ours not in SCHEDULER_MAPPING:
        base = SCHEDULER_MAPPING.get(name, FIFOScheduler)
        SCHEDULER_MAPPING[ours] = type(f"Restoring{base.__name__}", (_Restoring, base), {})
    return ours


SHARE_ALONE = 0.6
"""Of the memory, what transformers' own engine takes on a CPU."""


def complete_config(config: ContinuousBatchingConfig | None, chunk_size: int) -> ContinuousBatchingConfig:
    """Returns a copy of the user's configuration with what restoring needs.

    Raises:
        ValueError: the two do not go together; the message says what to change.
    """
    config = ContinuousBatchingConfig(page_size=chunk_size) if config is None else copy.deepcopy(config)
    page = config.page_size
    if page > chunk_size or chunk_size % page:
        raise ValueError(
            f"page_size is {page} tokens, and chunks have {chunk_size}: a chunk must be one page or several whole ones; set "
            f"ContinuousBatchingConfig(page_size={chunk_size}), or another chunk_size."
        )
    if config.max_batch_tokens is not None and config.max_batch_tokens < chunk_size:
        raise ValueError(
            f"max_batch_tokens is {config.max_batch_tokens}, less than a chunk of {chunk_size} tokens, which is computed in "
            "one step; raise it, or choose a smaller chunk_size."
        )
    if config.num_blocks is not None and config.num_blocks * page <= chunk_size:
        raise ValueError(
            f"num_blocks is {config.num_blocks}: memory for {config.num_blocks * page} tokens, too little for a prompt of one "
            f"chunk of {chunk_size}; raise it, or leave it out."
        )
    if config.use_async_batching:
        raise ValueError(
            "use_async_batching=True prepares a step before the one before it is over, which restoring cannot; leave it out."
        )
    config.use_async_batching = False
    config.scheduler_type = _scheduler_for(config.scheduler_type)
    return config


class EngineManager(ContinuousBatchingManager):  # type: ignore[misc]  # transformers has no types here
    """A manager that tells hooks what its engine does, and how long each step took.

    Attributes:
        stepped_seconds: of all steps.
        step_clock: seconds, to measure steps with.
    """

    step_clock = staticmethod(time.perf_counter)
    stepped_seconds = 0.0

    def __init__(
        self, model: Any, generation_config: GenerationConfig, config: ContinuousBatchingConfig, hints: Any = None
    ) -> None:
        takes_default = config.num_blocks is None and config.max_memory_percent is None
        self._share = default_share(model.device.type) if takes_default else None
        if self._share is not None:
            config.max_memory_percent = self._share
        super().__init__(model, generation_config, config, hints)
        self._engine: Engine | None = None

    def hooks_for(self, engine: Engine) -> Hooks | None:
        """Returns what the engine calls; None if it is to run as it does by itself. In the thread of the engine's steps."""
        raise NotImplementedError

    def wake(self) -> None:
        """Has the engine look again what it can do, if it waits."""
        self._wake_up_loop.set()

    def is_under_way(self, request_id: str) -> bool:
        """Returns whether the engine has a request of that id."""
        scheduler = None if self.batch_processor is None else self.batch_processor.scheduler
        return scheduler is not None and (
            request_id in scheduler.active_requests or request_id in scheduler.waiting_requests
        )

    def next_id(self) -> str:
        """Returns the id that the next request without one gets."""
        with self._request_lock:
            name = f"req_{self._request_counter}"
            self._request_counter += 1
            return name

    @property
    def tokens_in_memory(self) -> int | None:
        """How many tokens of one request the engine's memory holds; None if that is not known."""
        if self._engine is not None:
            return self._engine.room
        blocks = self.continuous_batching_config.num_blocks
        windows = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if blocks is None or windows is not None:  # layers with windows leave more of the memory to the others
            return None
        return int(blocks) * int(self.continuous_batching_config.page_size)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Pauses the steps, so that the caller can change the model in place; see transformers."""
        with super().pause():
            yield
            self.model_changed()

    def model_changed(self) -> None:
        """The model may have been changed, while no step was under way."""

    def start(self) -> None:
        """Starts the engine, as in transformers; also again, after `stop` has given the model its own attention back."""
        if not self.is_running():
            self.switch_to_cb_friendly_attn(self.model, self.continuous_batching_config.auto_switch_to_flash)
        super().start()

    def restore_attention(self) -> None:
        """Gives the model its own attention back, if the engine needed another."""
        own: str | None = self._original_attn_impl  # type: ignore[has-type]
        if own is not None:
            self.model.set_attn_implementation(own)
            self._original_attn_impl = None

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stops the engine, as in transformers. It may be started again."""
        super().stop(*args, **kwargs)
        if self.batch_processor is None and self._engine is not None:
            self._engine = None
            self.engine_gone()

    def engine_gone(self) -> None:
        """The engine, and its memory, are no longer used."""

    def _create_batch_processor(self) -> Any:
        try:
            processor = super()._create_batch_processor()
        except (MemoryError, ValueError):
            if self._share is None:
                raise
            self._share = None  # too little for this model's engine
            self.continuous_batching_config.max_memory_percent = SHARE_ALONE
            processor = super()._create_batch_processor()
        if self._engine is None or self._engine._processor is not processor:
            self._engine = Engine(processor)
            processor.scheduler.engine = self._engine
            processor.scheduler.hooks = self.hooks_for(self._engine)
        return processor

    def _generation_step(self) -> None:
        begin = self.step_clock()
        super()._generation_step()
        self.stepped_seconds += self.step_clock() - begin


def generation_config_of(model: Any, config: GenerationConfig | None) -> GenerationConfig:
    """Returns the generation configuration to use: a copy of the one given, or of the model's."""
    config = copy.deepcopy(model.generation_config if config is None else config)
    if config.eos_token_id is None:
        config.eos_token_id = -1  # as the engine means "none"
    return config


def hints_for(model: Any, inputs: Sequence[Sequence[int]], config: Any, max_new_tokens: int | None) -> WorkloadHints:
    """Returns what `generate_batch` tells an engine that it makes for these prompts."""
    config = model.generation_config if config is None else config
    new = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    return WorkloadHints(
        max_prompt_length=max((len(ids) for ids in inputs), default=0),
        max_generated_length=new or 0,
        num_requests=len(inputs) * (config.num_return_sequences or 1),
    )


def lend_to(model: Any, manager: Any) -> Callable[[], None]:
    """Has `model.generate_batch`, and all that uses the model's own manager, use this one; returns how to end that."""
    model._cached_continuous_batching_manager = manager

    def release() -> None:
        if getattr(model, "_cached_continuous_batching_manager", None) is manager:
            del model._cached_continuous_batching_manager

    return release
