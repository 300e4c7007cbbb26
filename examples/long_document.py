# %% [markdown]
# # One document, many questions
#
# A long document is brought into a cache once. Each question then continues from a copy of it, and only its own
# tokens are computed. Tomorrow, or in another process, the document comes from the store.

# %%
import copy
import tempfile
import time

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cake_hf
from cake_hf import CakeCache
from cake_hf.assets import RECALL_TINY
from cake_hf.testing.haystack import hide, make_facts, question, real_text

MODEL = RECALL_TINY  # for a real model change this line: MODEL = "Qwen/Qwen3-0.6B"
CHUNK_SIZE = 128  # the default is by device

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()

# %% [markdown]
# For a document of yours: `document = Path("report.txt").read_text()`, and questions that end with what the model
# shall go on from.

# %%
facts = make_facts(4, seed=2)
document = hide(real_text(8_000), facts, seed=2)
prompts = {fact.key: tokenizer(document + question(fact.key), return_tensors="pt") for fact in facts}
document_ids = tokenizer(document, return_tensors="pt").input_ids
print(f"{document_ids.shape[1]:,} tokens and {len(prompts)} questions, such as {question(facts[0].key)!r}")


# %%
def answer(key, cache, **options):
    inputs = prompts[key]
    begin = time.perf_counter()
    output = model.generate(**inputs, cache=cache, max_new_tokens=1, do_sample=False, **options)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :]), time.perf_counter() - begin


answer(facts[0].key, DynamicCache(config=model.config))  # the first run starts up the libraries, and is not counted

# %% [markdown]
# **Without a store** every question pays for the whole document.

# %%
plain = {key: answer(key, DynamicCache(config=model.config), prefill_chunk_size=CHUNK_SIZE) for key in prompts}

# %% [markdown]
# **With a store** the document is prefilled once, and each question gets a copy of the cache. `prefill` returns the
# report: here all was computed, since the store was empty.

# %%
store = tempfile.TemporaryDirectory()  # use a directory that stays, such as "~/.cache/cake_hf"
begin = time.perf_counter()
with CakeCache(model, store.name, chunk_size=CHUNK_SIZE) as cache:
    print(cache.prefill(document_ids))
    first = time.perf_counter() - begin
    copied = {key: answer(key, copy.deepcopy(cache)) for key in prompts}

# %% [markdown]
# **The next day** the store has the document, and even the prefill is short.

# %%
begin = time.perf_counter()
with CakeCache(model, store.name, chunk_size=CHUNK_SIZE) as cache:
    print(cache.prefill(document_ids))
    again = time.perf_counter() - begin
    warm = {key: answer(key, copy.deepcopy(cache)) for key in prompts}

# %% [markdown]
# The answers are the same in all three. (That the model has the right one is its own business: now and then it is
# wrong, and then it is equally wrong in all of them.)

# %%
print(f"{'question':<20}{'fact':<12}{'answer':<12}{'plain':>10}{'copy':>10}{'next day':>10}")
for fact in facts:
    runs = [run[fact.key] for run in (plain, copied, warm)]
    assert len({text for text, _ in runs}) == 1
    times = "".join(f"{seconds * 1e3:>7.0f} ms" for _, seconds in runs)
    print(f"{question(fact.key):<20}{fact.value:<12}{runs[0][0].strip():<12}{times}")

# %%
bars = cake_hf.plot_ttft(
    {
        "without a store": sum(seconds for _, seconds in plain.values()),
        "document computed, then copies": first + sum(seconds for _, seconds in copied.values()),
        "document restored, then copies": again + sum(seconds for _, seconds in warm.values()),
    },
    title=f"All {len(prompts)} answers",
)
bars.savefig("long-document.png")
bars
