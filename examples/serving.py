# %% [markdown]
# # A server that is restarted
#
# `cake-hf serve` is `transformers serve`, an OpenAI-compatible server with continuous batching, with a store behind it.
# Here a client asks about a long document, the server is stopped, another one is started, and the client asks again:
# the document's KV comes from the store. Needs `pip install "cake-hf[serve]"`.

# %%
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

from openai import OpenAI

import cake_hf
from cake_hf.testing.haystack import hide, make_facts, question, real_text

MODEL = "recall-tiny"  # for a real model change this line: MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# %% [markdown]
# The server is a process of its own. (In a shell: `cake-hf serve recall-tiny --store kv`, and Ctrl-C to end it.
# `--port 0` takes any free port, which the server names in its log; `--cb-num-blocks` bounds its memory for KV, which
# is most of the machine's otherwise.)

# %%
home = tempfile.TemporaryDirectory()


class Server:
    def __init__(self, store):
        program = "from cake_hf.cli.app import app; app()"
        options = ["--store", store, "--device", "cpu", "--port", "0", "--cb-num-blocks", "256"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", MODEL, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )
        log = []
        for line in self.process.stdout:
            log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise RuntimeError("".join(log))
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        self.model = self.client.models.list().data[0].id

    def ask(self, prompt):
        """The answer, the seconds until its first token, and the report of the prompt."""
        begin, text, first = time.perf_counter(), "", None
        stream = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=8, temperature=0, stream=True
        )
        for event in stream:
            first = first or time.perf_counter() - begin
            text += event.choices[0].text if event.choices else ""
        with urllib.request.urlopen(f"{self.url}/cake_hf/reports/{event.id}") as reply:
            return text.strip(), first, json.load(reply)

    def stop(self):
        """As Ctrl-C does: what was computed is saved before the process ends."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate()
        assert self.process.returncode == 0


def show(name, asked):
    text, seconds, report = asked
    chunks = ", ".join(f"{report[f'chunks_{kind}']} {kind}" for kind in ("loaded", "shared", "computed"))
    print(f"{name:<36} {text!r}, first token after {seconds * 1e3:>5.0f} ms; chunks: {chunks}")


# %% [markdown]
# **The first server** computes the document for the first question, and keeps it in memory for the second one. The
# small prompt before is so that starting up is not counted.

# %%
facts = make_facts(3, seed=5)
document = hide(real_text(10_000), facts, seed=5)
questions = [document + question(fact.key) for fact in facts]

server = Server(f"{home.name}/store")
server.ask("Good morning.")
first, second = server.ask(questions[0]), server.ask(questions[1])
show("first question (computed)", first)
show("second question (from memory)", second)
server.stop()

# %% [markdown]
# **The second server** has an empty memory. The document's chunks come from the store; while they are read from the
# back, the front is computed, if that is faster.

# %%
server = Server(f"{home.name}/store")
server.ask("Good morning.")
third, again = server.ask(questions[2]), server.ask(questions[0])
show("third question, after the restart", third)
show("first question again", again)
server.stop()

assert [text for text, *_ in (first, second, third, again)] == [fact.value for fact in [*facts, facts[0]]]
assert first[2]["chunks_loaded"] == 0
assert third[2]["chunks_missed"] == 0
assert third[2]["chunks_loaded"] > 0

# %%
bars = cake_hf.plot_ttft(
    {
        "first question (computed)": first[1],
        "second question (from memory)": second[1],
        "after the restart (from the store)": third[1],
    },
    title="Time to the first token, over HTTP",
)
bars.savefig("serving.png")
bars
