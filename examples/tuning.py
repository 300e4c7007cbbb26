# %% [markdown]
# # Tuning: bandwidth, chunk size and the first token
#
# How long the first token takes depends on how fast the model computes, how fast the store delivers, and how the
# prompt is cut. This measures all three on this machine. The store is slowed down to given bandwidths, as if it were
# far away.

# %%
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import cake_hf
from cake_hf import CakeCache, Limits, MemoryStore
from cake_hf.assets import RECALL_TINY
from cake_hf.scheduling.learning import CostLearner
from cake_hf.testing import ThrottledStore
from cake_hf.testing.haystack import real_text

MODEL = RECALL_TINY  # for a real model change this line: MODEL = "Qwen/Qwen3-0.6B"
CHUNK_SIZE = 128  # the default is by device

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
inputs = tokenizer(real_text(6_000), return_tensors="pt")
print(f"{inputs.input_ids.shape[1]:,} tokens")


# %% [markdown]
# One run: a new cache, one token. `strategy` forbids one of the two sides, to have something to compare with.


# %%
def run(store, strategy, chunk_size=CHUNK_SIZE, save=False):
    """The report of a run, and the seconds to its first token."""
    patient = Limits(read_timeout=60)  # slow reads are what we want to see here
    with CakeCache(model, store, chunk_size=chunk_size, strategy=strategy, save=save, limits=patient) as cache:
        begin = time.perf_counter()
        model.generate(**inputs, cache=cache, max_new_tokens=1, do_sample=False)
        seconds = time.perf_counter() - begin
        cache.flush()
    return cache.report, seconds


# %% [markdown]
# ## Bandwidth
#
# The first run fills a store in memory; the second tells how fast this machine computes. A store is *as fast as the
# model* where loading all chunks takes as long as computing them.

# %%
store = MemoryStore()
run(store, "compute", save=True)
computed, compute_seconds = run(store, "compute")
chunks = computed.chunks_computed
chunk_bytes = run(store, "load")[0].bytes_loaded / chunks
as_fast = chunks * chunk_bytes / compute_seconds
print(
    f"{chunks} chunks of {chunk_bytes / 2**10:,.0f} KiB; computed in {compute_seconds:.2f} s, at {as_fast / 1e6:.0f} MB/s"
)

# %%
seconds, loaded, met = {"compute only": compute_seconds}, {}, {}
for name, factor in {"half as fast": 0.5, "as fast": 1.0, "twice as fast": 2.0}.items():
    for strategy in ("load", "both"):
        report, took = run(ThrottledStore(store, factor * as_fast), strategy)
        seconds[f"{name}: {'load only' if strategy == 'load' else 'both ends'}"] = took
        (loaded if strategy == "load" else met)[name] = report
bars = cake_hf.plot_ttft(seconds, title="Stores half, equally and twice as fast as the model")
bars.savefig("tuning-bandwidth.png")
bars

# %% [markdown]
# Both ends at once are at best twice as fast as the better of the two alone, namely if the two are equally fast. The
# timeline at that bandwidth:

# %%
timeline = cake_hf.plot_timeline(met["as fast"])
timeline.savefig("tuning-timeline.png")
timeline

# %% [markdown]
# ## The split
#
# The costs of computing and loading a chunk are learned from the runs above. They tell how long each split would
# take; with the best one, both sides are done at about the same time. The marks are runs.

# %%
learner = CostLearner()
learner.saw_steps([(span.chunk, span.end - span.start) for span in computed.timeline if span.chunk >= 0])
learner.saw_loads(int(chunk_bytes), [(span.start, span.end) for span in loaded["as fast"].timeline if span.chunk >= 0])
runs = {"load only": loaded["as fast"], "both ends": met["as fast"], "compute only": computed}
curve = cake_hf.plot_split(learner.costs(), chunks, runs, title="A store as fast as the model")
curve.savefig("tuning-split.png")
curve

# %% [markdown]
# `cake-hf plan --model MODEL --store STORE --tokens 32768` draws the same for any model and store, from the costs
# learned in their earlier runs.
#
# ## Chunk size
#
# Small chunks meet more finely, but each costs a forward and a read of its own, and what is left over after the last
# full chunk is never stored. The chunk size is part of the key, so each size needs a store of its own (the throttle
# is the same).

# %%
sizes = {}
for chunk_size in (64, 128, 256, 512):
    own = MemoryStore()
    run(own, "compute", chunk_size, save=True)
    report, took = run(ThrottledStore(own, as_fast), "both", chunk_size)
    sizes[f"{chunk_size} tokens"] = took
    print(f"{chunk_size:>5} tokens: {report.chunks_loaded} chunks loaded, {report.chunks_computed} computed")
bars = cake_hf.plot_ttft(sizes, title="Both ends, by chunk size, at one bandwidth")
bars.savefig("tuning-chunk-size.png")
bars

# %% [markdown]
# ## Threads and time-outs
#
# `CakeCache(..., limits=Limits(loader_threads=4, read_timeout=2.5))`, or `CAKE_HF_LOADER_THREADS=4` where the program
# cannot be changed; see [docs/environment.md](../docs/environment.md). More threads help if a store's latency takes the
# time, and not if its bandwidth does:

# %%
far = ThrottledStore(store, 4 * as_fast, latency=compute_seconds / chunks)
threads = {}
for count in (1, 2, 4):
    with CakeCache(
        model, far, chunk_size=CHUNK_SIZE, strategy="load", save=False, limits=Limits(loader_threads=count)
    ) as cache:
        threads[f"{count} threads"] = cache.prefill(inputs.input_ids).prefill_seconds
bars = cake_hf.plot_ttft(threads, title="Load only, a store with high latency, by loader threads")
bars.savefig("tuning-threads.png")
bars
