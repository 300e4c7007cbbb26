"""Adds the results of a finished restore to its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cake_hf.restore.prompt import Prompt
from cake_hf.scheduling.frontier import Outcome
from cake_hf.transfer.loader import LoadJob


def count_restore(
    prompt: Prompt,
    outcomes: Mapping[int, Outcome],
    overruled: set[int],
    job: LoadJob,
    flown: set[int],
    states: int,
    patience: float,
) -> int:
    """Adds to the report which side made each chunk, what came from the store, and how loads ended; logs late loads.

    The numbers are added, not set, since the rows of a batch share a report.

    Args:
        prompt: of the restore.
        outcomes: of its loads, by chunk.
        overruled: chunks that were loaded, and then made again.
        job: of the loaders.
        flown: chunks that the main thread got from another restore.
        states: the number of snapshots loaded.
        patience: seconds that a load was waited for.

    Returns:
        How many chunks were not computed.
    """
    report, ends = prompt.report, Counter(outcomes.values())
    loaded = {index for index, outcome in outcomes.items() if outcome is Outcome.LOADED} - overruled
    own, shared = loaded - job.shared, (loaded & job.shared) | flown
    chunks = prompt.counted.intersection(range(prompt.chunks))
    tails = set(range(prompt.chunks)) - chunks
    report.chunks_loaded += len(own & chunks)
    report.chunks_shared += len(shared & chunks)
    report.chunks_computed += len(chunks - own - shared)
    report.tails_loaded += len(tails & (own | shared))
    report.tail_tokens_loaded += sum(prompt.blocks[index].tokens for index in tails & (own | shared))
    report.tails_computed += len(tails - own - shared)
    report.chunks_missed += ends[Outcome.MISSED]
    report.chunks_failed += ends[Outcome.CORRUPT] + ends[Outcome.ERROR] + ends[Outcome.LATE]
    if late := ends[Outcome.LATE]:
        job.faults.tell(
            "late",
            "Chunks that the store did not bring in time are computed instead: %s.",
            f"{late} of {len(outcomes)}, given up after {patience:g} s (Limits.read_timeout)",
        )
    report.states_loaded += states
    rounded = sum(prompt.blocks[index].tokens for index in job.frontier.rounded())
    report.tokens_lossy += rounded
    report.tokens_hurried += rounded
    report.bytes_stored += sum(
        took.nbytes - took.raw_bytes
        for index, took in list(job.took.items())
        if index in own and took.nbytes < took.raw_bytes and not took.is_rounded
    )
    report.bytes_loaded += job.place.wanted_bytes(own) + states * prompt.state_layout.nbytes
    return len(own | shared)
