"""`cake-hf serve` on loopback, in a thread or in a process of its own, and the real `openai` client. PYTEST_DONT_REWRITE

Where fastapi, uvicorn and openai are not installed, the tests are skipped, unless CAKE_HF_REQUIRE_SERVERS=1 asks for a failure.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import cake_hf
from cake_hf import Store
from commands import save_model
from models import CHUNK
from servers import missing
from waiting import PATIENCE, await_true

TEMPLATE = "{% for message in messages %}w3 {{ message['content'] }} {% endfor %}w4"

NEW = 6


def require_server() -> None:
    """Skips the test where transformers has no server, or what it needs is not installed."""
    from cake_hf.cli.server_seams import missing_packages
    from cake_hf.layers.compat import is_older_than

    if is_older_than("5.20"):
        missing("transformers is older than 5.20")
    if lacking := missing_packages():
        missing(f"not installed: {', '.join(lacking)}")


def save_chat_model(folder: Path) -> Path:
    """A tiny random model of words, with a chat template that gives "w3 MESSAGE w3 REPLY w3 MESSAGE w4"."""
    save_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Asking:
    """A client of one server.

    Args:
        port: of the server, on 127.0.0.1.
        model: that it serves.
    """

    def __init__(self, port: int, model: str) -> None:
        import openai

        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
        self.model = model

    def chat(self, messages: Sequence[str], **options: Any) -> Any:
        """The answer to a conversation whose first message, and every second one from there, is the user's."""
        roles = ("user", "assistant")
        said: Any = [{"role": roles[number % 2], "content": text} for number, text in enumerate(messages)]
        options = {"max_tokens": NEW, "temperature": 0, **options}
        return self.client.chat.completions.create(model=self.model, messages=said, **options)

    def told(self, *messages: str) -> tuple[str, dict[str, Any]]:
        """The answer's text, and the report of its prompt."""
        answer = self.chat(messages)
        return answer.choices[0].message.content, self.report(answer.id)

    def report(self, request_id: str) -> dict[str, Any]:
        """What happened to a request's prompt."""
        with self._open(f"{self.url}/cake_hf/reports/{request_id}") as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    @staticmethod
    def _open(url: str) -> Any:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=PATIENCE)


class Running(Asking):
    """A server in a thread of this process, and a client of it.

    Attributes:
        server: transformers' server, with our manager in it.
    """

    def __init__(self, server: Any, model: str) -> None:
        self.server = server
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()
        await_true(lambda: bool(server.ports) or not self._thread.is_alive())
        if not server.ports:
            self.end()
        super().__init__(server.ports[0], model)

    def end(self) -> None:
        """Ends the server, as a signal does."""
        self.server.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not end"
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self._error = error


def defaults(**options: Any) -> dict[str, Any]:
    """Options of `transformers serve`: for a small engine on a free port."""
    from cake_hf.cli.server_seams import options_of_transformers

    known = {one.name: one.default for one in options_of_transformers()}
    return {**known, "port": 0, "host": "127.0.0.1", "device": "cpu", "cb_num_blocks": 128, **options}


@contextmanager
def running(model: Path, store: Store, *, options: dict[str, Any] | None = None, **restoring: Any) -> Iterator[Running]:
    """A server in a thread, with that store."""
    from cake_hf.cli.serve import Restoring, make_server

    verbosity = transformers_logging.get_verbosity()
    chosen = Restoring(**{"store": "of the test", "chunk_size": CHUNK, **restoring})
    server = Running(make_server(str(model), store, chosen, defaults(log_level="error", **(options or {}))), str(model))
    try:
        yield server
    finally:
        server.end()
        transformers_logging.set_verbosity(verbosity)


class Child(Asking):
    """`cake-hf serve` in a process of its own, and a client of it. The caller ends or kills it."""

    def __init__(self, model: Path, store: str, **environment: str) -> None:
        command = [
            sys.executable,
            "-c",
            "from cake_hf.cli.app import app; app()",
            "serve",
            str(model),
            "--store",
            store,
        ]
        command += ["--chunk-size", str(CHUNK), "--port", "0", "--host", "127.0.0.1", "--device", "cpu"]
        command += ["--cb-num-blocks", "128"]
        source = str(Path(cake_hf.__path__[0]).parent)
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[str] = []
        self._ports: queue.Queue[int] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            super().__init__(self._ports.get(timeout=2 * PATIENCE), str(model))
        except BaseException:
            self.kill()
            print("".join(self.lines))
            raise

    def end(self, number: signal.Signals) -> int:
        """Its exit code when it is told to end by that signal."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """Ends it, however it is. May be called twice."""
        self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self._ports.put(int(found[1]))


@cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def expected_answer(folder: Path, *messages: str) -> str:
    """What the model's own `generate` answers to a conversation."""
    model, tokenizer = _loaded(folder)
    text = " ".join([*(f"w3 {message}" for message in messages), "w4"])
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    answer: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def words(count: int, seed: int = 0) -> str:
    """So many words that the model knows."""
    drawn = torch.randint(5, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{number}" for number in drawn)
