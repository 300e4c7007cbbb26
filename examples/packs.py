# %% [markdown]
# # Sharing a pack
#
# The KV of a document that many people ask about (a manual, a law, a code base) can be computed once and handed on as
# a **pack**: a folder with chunks, a manifest that has the digest of every byte, and a card. Here it goes through a
# folder; with `cake-hf push` and `hf://org/pack@<commit>` it goes through the Hugging Face Hub in the same way.

# %%
import logging
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cake_hf
from cake_hf import CakeCache, CakeError
from cake_hf.assets import RECALL_TINY
from cake_hf.testing.haystack import hide, make_facts, question, real_text

MODEL = RECALL_TINY  # for a real model change this line: MODEL = "Qwen/Qwen3-0.6B"
CHUNK_SIZE = 128  # the default is by device

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()

facts = make_facts(3, seed=1)
document = hide(real_text(8_000), facts, places=[0.2, 0.5, 0.8])
document_ids = tokenizer(document, return_tensors="pt").input_ids

# %% [markdown]
# **The author** prefills the document and exports it. `exact=False` makes KV that other machines may use: the weights
# and the dtype must be the same, the libraries and the processor need not be. `whole=True` computes a full chunk at
# the very end, too.

# %%
author, pack = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
with CakeCache(model, author.name, chunk_size=CHUNK_SIZE, exact=False) as cache:
    cache.prefill(document_ids, whole=True)
manifest = cake_hf.export_pack(author.name, pack.name, model, document_ids, chunk_size=CHUNK_SIZE, exact=False)

first, end = manifest.tokens
print(f"{len(manifest.chunks)} chunks for tokens {first} to {end}, {manifest.nbytes / 2**20:.1f} MiB, {manifest.dtype}")
for file in sorted(file for file in Path(pack.name).iterdir() if file.is_file()):
    print(f"    {file.name}, {file.stat().st_size:,} bytes")
print(f"    and {len(list(Path(pack.name).rglob('*.safetensors')))} chunks as safetensors files")


# %% [markdown]
# **A reader** names the pack where a store is asked for. It is read-only, and read as it is needed: what the front
# computes is never fetched. (From the Hub: `CakeCache(model, "hf://org/pack@<commit>", exact=False)`.)


# %%
def answer(fact, cache, **options):
    inputs = tokenizer(document + question(fact.key), return_tensors="pt")
    begin = time.perf_counter()
    output = model.generate(**inputs, cache=cache, max_new_tokens=1, do_sample=False, **options)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :]).strip(), time.perf_counter() - begin


for _ in range(2):  # the first run starts up the libraries
    plain = answer(facts[1], DynamicCache(config=model.config), prefill_chunk_size=CHUNK_SIZE)
with CakeCache(model, f"pack:{pack.name}", chunk_size=CHUNK_SIZE, exact=False) as from_pack:
    shared = answer(facts[1], from_pack)

print(f"The fact: {facts[1].line!r}. Without the pack: {plain[0]!r}, with it: {shared[0]!r}.\n")
print(from_pack.report)
assert shared[0] == plain[0]
assert from_pack.report.chunks_missed == 0

# %%
timeline = cake_hf.plot_timeline(from_pack.report)
timeline.savefig("packs-timeline.png")
timeline

# %% [markdown]
# **To keep it**, a pack is imported into a store. Each chunk is checked against the manifest on its way; what is
# there already is not read again. With `model` a pack that this model could never use is refused.

# %%
reader = tempfile.TemporaryDirectory()
imported = cake_hf.import_pack(pack.name, reader.name, model=model)
print(f"{imported.chunks} chunks, {imported.nbytes / 2**20:.1f} MiB")
print(f"once more: {cake_hf.import_pack(pack.name, reader.name, model=model).chunks} chunks")

# %% [markdown]
# **Another model** finds nothing in it. A changed weight makes another model: a pack cannot be used by mistake.

# %%
changed = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
with torch.no_grad():
    next(changed.parameters()).mul_(1.001)
try:
    cake_hf.import_pack(pack.name, reader.name, model=changed)
except CakeError as error:
    print(str(error).replace(pack.name, "PACK"))
else:
    raise AssertionError("a pack of another model was taken")

# %% [markdown]
# **A damaged pack** costs time and nothing else: the broken chunk is computed, and counted as failed.

# %%
chunk = sorted(Path(pack.name).rglob("*.safetensors"))[0]
raw = bytearray(chunk.read_bytes())
raw[-1] ^= 1  # one bit
chunk.write_bytes(raw)
logging.getLogger("cake_hf").setLevel(logging.ERROR)  # it warns, too; that is not what is shown here
with CakeCache(model, f"pack:{pack.name}", chunk_size=CHUNK_SIZE, exact=False, strategy="load") as from_damaged:
    damaged = answer(facts[1], from_damaged)
print(from_damaged.report)
assert damaged[0] == plain[0]
assert from_damaged.report.chunks_failed == 1
