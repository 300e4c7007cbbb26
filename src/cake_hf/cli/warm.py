"""`cake-hf warm`: puts the KV of a document into a store, so that prompts that start with it need not be computed."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from cake_hf.blocks import blocks
from cake_hf.cache import CakeCache
from cake_hf.cache.restoring import RestoringCache
from cake_hf.chunks.codec import stored_bytes
from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.documents import read_document
from cake_hf.cli.keeping import refuse_over_budget
from cake_hf.cli.models import load_model, load_tokenizer, refuse_too_long
from cake_hf.cli.sheets import Lanes, report_table
from cake_hf.errors import CakeError
from cake_hf.keys import canonical
from cake_hf.layers.compat import GENERATE_LINE
from cake_hf.limits import Limits
from cake_hf.model.kv_layout import chunk_layout, kv_template
from cake_hf.model.plainly import ComputePlainly
from cake_hf.report import Report
from cake_hf.restore.session import chosen_chunk_size
from cake_hf.stores.records import Record, keep
from cake_hf.util.redaction import shown_url
from cake_hf.util.sizes import count_text


@dataclass(frozen=True)
class WarmJob:
    """The document to be warmed, and how.

    Attributes:
        model: a folder, or a name on the Hub.
        file: the document, UTF-8 text.
        store: as `CakeCache` takes it.
        chunk_size, salt, exact: as `CakeCache` takes them; without a size, "auto".
        dtype: the dtype of the weights; see `options.Dtype`.
        device: as torch names it, or "auto".
        tokens: how many tokens to keep, from the start; None for all.
        keep_words: store the text's first words, for lists of the store's content.
        prompt: prompts continue from its very end, so its last tokens are kept, too, as by `CakeCache.prefill`.
        chat: the document starts a user's message, in the model's chat template.
        system: the system prompt, UTF-8 text; with `chat`.
        boundaries: cuts that prompts declare, too, in tokens from the start.
        codec: as `CakeCache` takes it.
    """

    model: str
    file: Path
    store: str
    chunk_size: int | None = None
    salt: str = ""
    exact: bool = True
    dtype: str = "auto"
    device: str = "auto"
    tokens: int | None = None
    keep_words: bool = False
    prompt: bool = False
    chat: bool = False
    system: Path | None = None
    boundaries: Sequence[int] = ()
    codec: str = "none"


Loaded = tuple[Any, Any]
"""A tokenizer and its model."""


def load(job: WarmJob) -> Loaded:
    """Loads what a job needs, to be reused for several jobs with the same model.

    Raises:
        ValueError: the model cannot be used.
    """
    with console.status("loading the model"):
        return load_tokenizer(job.model), load_model(job.model, job.dtype, job.device)


def warm(job: WarmJob, loaded: Loaded | None = None) -> Report:
    """Prefills the document into the store and waits until all of it is durable.

    Raises:
        CakeError: nothing of it can be restored (the report's reason), or some of it could not be saved.
        ValueError: the model or the file cannot be used.
    """
    if job.keep_words and job.salt:
        raise ValueError(SALTED_WORDS)
    document = read_document(job.file, job.chat, job.system, job.tokens, job.boundaries)
    tokenizer, model = loaded or load(job)
    ids = document.ids(tokenizer)
    refuse_too_long(model.config, ids.shape[1], "pass --tokens to take only the start of the text.")
    limits = Limits.from_environment()
    size = job.chunk_size or "auto"
    with CakeCache(
        model, job.store, chunk_size=size, salt=job.salt, exact=job.exact, limits=limits, codec=job.codec
    ) as cache:
        cache.store.check_writable()  # a cache goes on without a store that takes nothing; here, saving is the whole purpose
        _refuse_over_budget(cache, model, min(chosen_chunk_size(model, size), ids.shape[1]))
        pace = Pace(cache, limits.save_queue_bytes // 2)
        with progress_bar("prefill", "chunks") as show:

            def progress(done: int, total: int) -> None:
                show(done, total)
                pace(done)

            whole = not (job.prompt or job.chat)
            report = cache.prefill(ids, boundaries=job.boundaries, whole=whole, progress=progress)
        with console.status("waiting until all chunks are durable"):
            cache.flush()
        if job.keep_words:
            keep_words(cache, document.text)
    _refuse_unsaved(report)
    return report


MOST_KEPT = 8
"""The most words that are kept."""

MAX_LETTERS = 80

SALTED_WORDS = (
    "First words are not kept of what is saved under a salt, since others could read them; leave out --keep-words."
)


def keep_words(cache: RestoringCache, text: str) -> None:
    """Keeps the first words of the document that a cache holds. Call it once the document's chunks are durable.

    Raises:
        ValueError: there is a salt, whose purpose is to hide documents from others.
        StoreError: they cannot be kept.
    """
    session = cache._session
    if session.salt:
        raise ValueError(SALTED_WORDS)
    if not cache._held.keys:
        return
    now, words = int(time.time()), " ".join(text.split(maxsplit=MOST_KEPT)[:MOST_KEPT])[:MAX_LETTERS]
    namespace, metadata = (
        session.bound_model.latest_namespace(),
        json.loads(canonical(session.bound_model.latest_metadata())),
    )
    keep(
        session.bound_store.store,
        Record(namespace, metadata, session.bound_model.name, now, now, {cache._held.keys[-1]: words}),
    )


class Pace:
    """Keeps the writer's queue from running over, which would leave chunks unsaved: here there is time to wait."""

    def __init__(self, cache: CakeCache, most: int) -> None:
        self._cache = cache
        self._most = most

    def __call__(self, done: int) -> None:
        """Waits for the writer if too much is queued. To be called after each computed chunk."""
        report = self._cache.report
        if not report.chunks_saved:
            self._cache.flush()  # the size of a chunk is known from now on
            return
        chunk_bytes = report.bytes_saved / report.chunks_saved
        if (done - report.chunks_saved - report.chunks_unsaved) * chunk_bytes > self._most:
            self._cache.flush()


def show_warmed(job: WarmJob, report: Report, *, has_template: bool = False) -> None:
    """Shows what was done, what will be restored from it, and how."""
    console.print(Panel(report_table(report), title="warmed", title_align="left", border_style="green", expand=False))
    if report.chunks_computed and report.chunks_loaded:
        console.print(Lanes(report))
    for line in what_hits(job, report, has_template=has_template):
        console.print(line)
    console.print()
    console.print(Syntax(_snippet(job), "python", background_color="default", word_wrap=True))
    look = f"cake-hf ls {shlex.quote(shown_url(job.store))}"
    console.print(Text.assemble("\nLook at it with  ", (look, "bold")), soft_wrap=True)


def stored_tokens(job: WarmJob, report: Report) -> int:
    """Returns the number of tokens, from its start, that a document was stored with."""
    named = blocks(0, report.tokens, job.boundaries, report.chunk_size)
    is_end_kept = (job.prompt or job.chat) and report.tails_computed + report.tails_loaded > 0
    if named and not named[-1].fills(report.chunk_size) and not is_end_kept:
        named.pop()
    return named[-1].end if named else 0


def what_hits(job: WarmJob, report: Report, *, has_template: bool) -> list[str]:
    """Describes, in sentences, which prompts find what was stored."""
    stored, tails = stored_tokens(job, report), report.tails_computed + report.tails_loaded
    rest = report.tokens - stored
    machine = ", on this machine with these versions and this number of threads" if job.exact else ""
    salt = " and salt" if job.salt else ""
    lines = [
        f"\nThe first {stored:,} of the {report.tokens:,} tokens are stored. Every prompt that starts with them, in any "
        f"process, restores them: with the same model, dtype, chunk size{salt}{machine}.",
    ]
    if rest:
        lines.append(f"The last {count_text(rest, 'token')} of the text, and what follows it, are computed each time.")
    if tails:
        lines.append(
            f"What is not in full chunks ({count_text(tails, 'tail')}) is found by prompts that declare where they are cut, as "
            "below."
        )
    if has_template and not job.chat:
        lines.append(
            "The model has a chat template: a prompt from apply_chat_template begins with other tokens than the text alone, "
            "and finds none of this."
        )
    return lines


def _snippet(job: WarmJob) -> str:
    options = [f"store={shown_url(job.store)!r}"]
    options += [f"chunk_size={job.chunk_size}"] if job.chunk_size else []
    options += ["salt=..."] if job.salt else []
    options += ["exact=False"] if not job.exact else []
    options += [f"codec={job.codec!r}"] if job.codec != "none" else []
    made = f"cache = CakeCache(model, {', '.join(options)})\n"
    cuts = f", boundaries={list(job.boundaries)}" if job.boundaries else ""
    if job.chat:
        system = ", system=system" if job.system else ""
        return f"{made}cache.prefill(cake_hf.chat_document(tokenizer, document{system}){cuts})\n{GENERATE_LINE}"
    if not job.prompt and not job.boundaries:
        return f"{made}{GENERATE_LINE}"
    whole = "" if job.prompt else ", whole=True"
    return f"{made}cache.prefill(document_ids{cuts}{whole})\n{GENERATE_LINE}"


def _refuse_over_budget(cache: CakeCache, model: Any, tokens: int) -> None:
    """Raises an error if the store could not take a block of so many tokens."""
    with suppress(ComputePlainly):
        if not cache.passive:
            refuse_over_budget(cache.store, stored_bytes(chunk_layout(kv_template(model), tokens)))


def _refuse_unsaved(report: Report) -> None:
    if not report.chunks_computed + report.chunks_loaded + report.tails_computed + report.tails_loaded:
        raise CakeError(f"Nothing was warmed: {report.reason}.")
    if report.chunks_unsaved:
        raise CakeError(f"{report.chunks_unsaved} chunks could not be saved; see the warning above and run it again.")
