# %% [markdown]
# # A chat that survives a restart
#
# A chat begins with a long text and goes on for some turns; then the process ends. Another process takes it up: the
# KV of all that was said comes from the store. Both are real processes here, with nothing in common but a directory.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cake_hf
from cake_hf.people.haystack import hide, make_facts, question, real_text
from cake_hf.people.models import RECALL_TINY

MODEL = RECALL_TINY  # for a real model change this line: MODEL = "Qwen/Qwen3-0.6B"

# %% [markdown]
# The program of both. The conversation is kept as token ids, beside the store. That way the next turn begins with
# exactly the tokens that the cache has seen: text that is tokenized again may be cut differently where a reply ends.
# One cache serves all turns of a process, as a `DynamicCache` would.

# %%
PROGRAM = """
import json, sys, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cake_hf import CakeCache

name, folder = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
model.generate(torch.ones((1, 300), dtype=torch.long), max_new_tokens=2)  # starting up is not counted as a turn's work
history = folder / "conversation.json"
said = json.loads(history.read_text()) if history.exists() else []


def turn_text(message):
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
    return message


def reply_to(ids, **options):
    begin = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **options)
    return output[0, ids.shape[1] :].tolist(), time.perf_counter() - begin


with CakeCache(model, folder / "store", chunk_size=128) as cache:
    for message in json.load(sys.stdin):
        said += tokenizer(turn_text(message), add_special_tokens=False).input_ids
        ids = torch.tensor([said])
        reply, seconds = reply_to(ids, cache=cache)
        plain, plain_seconds = reply_to(ids, prefill_chunk_size=128)  # the same without cake_hf, to compare with
        assert reply == plain
        said += reply
        text = tokenizer.decode(reply, skip_special_tokens=True).strip()
        told = {"reply": text, "tokens": ids.shape[1], "seconds": seconds, "plain_seconds": plain_seconds}
        print(json.dumps({**told, "report": cache.report.as_dict()}), flush=True)

history.write_text(json.dumps(said))
"""

home = tempfile.TemporaryDirectory()
program = Path(home.name, "chat_program.py")
program.write_text(PROGRAM)


def run_in_a_process(messages, folder):
    """A new process says these messages; what it tells of each turn."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, program, MODEL, folder], input=json.dumps(messages), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def show(turns):
    for turn in turns:
        report = turn["report"]
        print(
            f"{turn['tokens']:>6,} tokens -> {turn['reply']:<10} {turn['seconds'] * 1e3:>6.0f} ms, "
            f"chunks: {report['chunks_loaded']} loaded, {report['chunks_computed']} computed"
        )


# %% [markdown]
# **Monday.** The first message brings a long text and asks for a fact in it; the second asks for another one.

# %%
facts = make_facts(4, seed=5)
text = hide(real_text(8_000), facts, seed=5)
ask = [question(fact.key) for fact in facts]
monday = run_in_a_process([text + ask[0], "\n" + ask[1]], Path(home.name, "chat"))
show(monday)

# %% [markdown]
# **Tuesday.** That process is gone. A new one goes on with the third question, and then with the fourth.

# %%
tuesday = run_in_a_process(["\n" + ask[2], "\n" + ask[3]], Path(home.name, "chat"))
show(tuesday)
assert tuesday[0]["report"]["chunks_missed"] <= 1  # the last one may not have been full on Monday

# %% [markdown]
# Each reply was compared with that of a `generate` without cake_hf, which has to compute all that was said before. That
# is what Tuesday's first message would have taken:

# %%
bars = cake_hf.plot_ttft(
    {
        "Monday, first message (the text)": monday[0]["seconds"],
        "Monday, second message": monday[1]["seconds"],
        "Tuesday, from the store": tuesday[0]["seconds"],
        "Tuesday, without a store": tuesday[0]["plain_seconds"],
    },
    title="Time to the first token of each reply",
)
bars.savefig("chat.png")
bars
