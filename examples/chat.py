# %% [markdown]
# # A chat that survives a restart
#
# A chat starts with a long text and continues for some turns; then the process ends. Another process resumes it: the KV
# of the whole conversation comes from the store. Both are real processes here, which share only a directory.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cake_hf
from cake_hf.assets import RECALL_TINY
from cake_hf.testing.haystack import hide, make_facts, question, real_text

MODEL = RECALL_TINY  # for a real model change this line: MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# %% [markdown]
# The program of both. The conversation is kept as messages, as chat programs do. For each turn the model's own template
# renders all of it, and `chat_prompt` says where messages end: these are the cuts, so what was stored up to there is
# found again, in this process and in any other. (The small model that comes with the package is no chat model; it gets
# a template that only puts messages one after the other.)

# %%
PROGRAM = """
import json, sys, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cake_hf import CakeCache, chat_prompt

name, folder = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
tokenizer.chat_template = tokenizer.chat_template or (
    "{% for message in messages %}{{ message['content'] }}{{ '\\\\n' if message['role'] == 'assistant' }}{% endfor %}"
)
model.generate(torch.ones((1, 300), dtype=torch.long), max_new_tokens=2)  # starting up is not counted as a turn's work
history = folder / "conversation.json"
messages = json.loads(history.read_text()) if history.exists() else []


def reply_to(ids, **options):
    begin = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options)
    return output[0, ids.shape[1] :].tolist(), time.perf_counter() - begin


for message in json.load(sys.stdin):
    messages.append({"role": "user", "content": message})
    ids, boundaries = chat_prompt(tokenizer, messages)
    with CakeCache(model, folder / "store") as cache:
        begin = time.perf_counter()
        report = cache.prefill(ids[:, : boundaries[-1]] if boundaries else ids, boundaries=boundaries)
        brought = time.perf_counter() - begin
        reply, seconds = reply_to(ids, cache=cache)
    plain, plain_seconds = reply_to(ids)  # the same without cake_hf, to compare with
    assert reply == plain
    text = tokenizer.decode(reply, skip_special_tokens=True).strip()
    messages.append({"role": "assistant", "content": text})
    told = {"reply": text, "tokens": ids.shape[1], "new": len(reply), "plain_seconds": plain_seconds}
    print(json.dumps({**told, "seconds": brought + seconds, "report": report.as_dict()}), flush=True)

history.write_text(json.dumps(messages))
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


def restored(turn):
    """Chunks, and what lies between them and the ends of messages, that came from the store."""
    return turn["report"]["chunks_loaded"] + turn["report"]["tails_loaded"]


def computed(turn):
    """Those that had to be computed."""
    return turn["report"]["chunks_computed"] + turn["report"]["tails_computed"]


def show(turns):
    for turn in turns:
        print(
            f"{turn['tokens']:>6,} tokens -> {turn['reply']!r} ({turn['new']} tokens), {turn['seconds'] * 1e3:>6.0f} ms, "
            f"chunks and tails: {restored(turn)} loaded, {computed(turn)} computed"
        )


# %% [markdown]
# **Monday.** The first message brings a long text and asks for a fact in it; the second asks for another one.

# %%
facts = make_facts(4, seed=5)
text = hide(real_text(8_000), facts, seed=5)
ask = [question(fact.key) for fact in facts]
monday = run_in_a_process([text + ask[0], ask[1]], Path(home.name, "chat"))
show(monday)

# %% [markdown]
# **Tuesday.** That process is gone. A new one goes on with the third question, and then with the fourth.

# %%
tuesday = run_in_a_process([ask[2], ask[3]], Path(home.name, "chat"))
show(tuesday)
assert all(turn["report"]["chunks_missed"] == 0 for turn in [monday[1], *tuesday])  # each finds the long text

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
    title="Time to each reply",
)
bars.savefig("chat.png")
bars
