# %% [markdown]
# # Quickstart
#
# One question about a long text, asked twice. The first time the model computes the text's KV, and cake_hf keeps it
# in a store; the second time it comes from there. The answer is the same, to the last bit of the logits.
#
# This runs offline on a small model that comes with the package. It can do one thing: recall facts that are hidden in
# a long text.

# %%
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cake_hf
from cake_hf import CakeCache
from cake_hf.assets import RECALL_TINY
from cake_hf.testing.haystack import hide, make_facts, question, real_text

MODEL = RECALL_TINY  # for a real model change this line: MODEL = "Qwen/Qwen3-0.6B"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()

# %% [markdown]
# The text is source code of the Python that runs this, with three facts between its lines. We ask for the one in the
# middle.

# %%
facts = make_facts(3)
document = hide(real_text(8_000), facts, places=[0.2, 0.5, 0.8])
inputs = tokenizer(document + question(facts[1].key), return_tensors="pt")

print(f"{inputs.input_ids.shape[1]:,} tokens, hidden in them: {facts[1].line!r}")
print(f"The question: {question(facts[1].key)!r}")


# %% [markdown]
# Any cache can be handed to `generate`, and nothing else changes. The model's answer is one token, so the time of
# the call is that to the first token.


# %%
def ask(cache, **options):
    begin = time.perf_counter()
    output = model.generate(
        **inputs,
        cache=cache,
        max_new_tokens=1,  # a real model has more to say
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    seconds = time.perf_counter() - begin
    answer = tokenizer.decode(output.sequences[0, inputs.input_ids.shape[1] :])
    return answer, torch.stack(output.logits), seconds


# %% [markdown]
# First transformers alone, in chunks as cake_hf takes them; twice, since the first run starts up the libraries. Then
# **cold**: the store is empty. Then **warm**: a new cache on the same store. (In a new process it is the same; the
# chat notebook shows it.)

# %%
CHUNK_SIZE = 128  # of a small model's short prompt; the default is by device
store = tempfile.TemporaryDirectory()  # use a directory that stays, such as "~/.cache/cake_hf"

for _ in range(2):
    plain = ask(DynamicCache(config=model.config), prefill_chunk_size=CHUNK_SIZE)

with CakeCache(model, store.name, chunk_size=CHUNK_SIZE) as cold_cache:
    cold = ask(cold_cache)

with CakeCache(model, store.name, chunk_size=CHUNK_SIZE) as warm_cache:
    warm = ask(warm_cache)

for name, (answer, logits, seconds) in {"transformers": plain, "cold": cold, "warm": warm}.items():
    same = "equal, bit for bit" if torch.equal(logits, plain[1]) else "DIFFERENT"
    print(f"{name:<13} {answer!r:<12} logits {same}, {seconds * 1e3:.0f} ms")

assert torch.equal(cold[1], plain[1])
assert torch.equal(warm[1], plain[1])

# %%
bars = cake_hf.plot_ttft({"transformers alone": plain[2], "cold": cold[2], "warm": warm[2]})
bars.savefig("quickstart-ttft.png")
bars

# %% [markdown]
# Every cache has a report of its last prompt. As the value of a cell, `warm_cache.report` is a table; printed, it is
# text.

# %%
print(cold_cache.report)
print()
print(warm_cache.report)

# %% [markdown]
# Its timeline as a picture: the loader threads bring chunks from the back, the main thread would meet them from the
# front. From a disk as near as this one, loading is so much faster than computing that next to nothing but the
# suffix is left to compute. (Grey is a forward that was preempted, since its chunk had come from the store.)
# The tuning notebook slows the store down, and there the two meet in the middle.

# %%
timeline = cake_hf.plot_timeline(warm_cache.report)
timeline.savefig("quickstart-timeline.png")
timeline
