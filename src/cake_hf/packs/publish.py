"""Publishes a pack on the Hugging Face Hub in one commit, chunk by chunk, without a folder or memory for the whole pack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cake_hf.errors import StoreError
from cake_hf.packs.card import About, card_text
from cake_hf.packs.contents import Progress, Sink, contents_of, no_progress
from cake_hf.stores.hub import SCHEME, hub_client, parse_hub_name, plain_errors
from cake_hf.stores.manifest import CARD, MANIFEST, PackManifest
from cake_hf.stores.opening import StoreSpec

UPLOADS_AT_ONCE = 4
"""Chunks that are uploaded at once, and so are in memory at the same time."""

_CHUNK_FILE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{40}\.safetensors")


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        url: the URL to open the pack by, pinned to the commit.
        manifest: the pack's manifest.
        missing: number of the prompt's chunks, and tails at declared boundaries, that were not in the store.
    """

    url: str
    manifest: PackManifest
    missing: int


def push_pack(
    store: StoreSpec,
    repo: str,
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    *,
    boundaries: Iterable[int] = (),
    chunk_size: int | str = "auto",
    salt: str = "",
    exact: bool = True,
    allow_salted: bool = False,
    about: str = "",
    base_model: str = "",
    codec: str = "none",
    private: bool | None = None,
    progress: Progress = no_progress,
) -> Pushed:
    """Publishes the stored KV of a prompt as a pack on the Hub, with the Hub client's own endpoint and token.

    Args:
        store: the store that has the KV, as `CakeCache` takes it.
        repo: "org/name"; created if it is missing. An older pack in it is replaced; a repository with other contents is
            refused.
        model, input_ids, boundaries, chunk_size, salt, exact, allow_salted, about, base_model, codec: as for
            `export_pack`.
        private: whether a new repository is private; by default the Hub decides.
        progress: called with (files handed to the client, all files).

    Raises:
        StoreError, CorruptChunk, CakeError, TypeError, ValueError: as for `export_pack`; a StoreError also if the repository
            holds something else, you may not write to it, or the Hub cannot be reached.
    """
    told = About(about, base_model)
    repo, revision = parse_hub_name(repo)
    if revision != "main":
        raise StoreError(f"A pack is pushed to a repository's main branch; leave @{revision} out.")
    options: dict[str, Any] = {"chunk_size": chunk_size, "salt": salt, "exact": exact, "codec": codec}
    with (
        contents_of(store, model, input_ids, boundaries=boundaries, allow_salted=allow_salted, **options) as contents,
        _without_bars(),
    ):
        sink = HubSink(repo, private)
        manifest = contents.write(sink, partial(card_text, about=told), progress)
        return Pushed(f"{SCHEME}{repo}@{sink.commit}", manifest, contents.missing)


class HubSink(Sink):
    """Uploads the files of a pack and combines them into one commit at the end.

    Args:
        repo: "org/name"; created if it is missing.
        private: whether a new repository is private.

    Attributes:
        commit: 40 hexadecimal digits; empty until `finish` is done.

    Raises:
        StoreError: the repository holds something other than a pack, or the Hub refuses; the methods may raise it, too.
    """

    def __init__(self, repo: str, private: bool | None) -> None:
        self.name = f"{SCHEME}{repo}"
        self.commit = ""
        self._hub, self._repo = hub_client(), repo
        self._api = self._hub.HfApi(library_name="cake_hf")
        with self._plain_errors():
            self._api.create_repo(repo, private=private, exist_ok=True)
            self._parent = self._api.repo_info(repo).sha
            files = set(self._api.list_repo_files(repo, revision=self._parent))
        if MANIFEST not in files and files - {".gitattributes", CARD}:
            raise StoreError(f"The repository {repo} holds something else than a pack; give one of its own.")
        self._stale = {path for path in files if _CHUNK_FILE.fullmatch(path)}
        self._waiting: list[Any] = []
        self._operations: list[Any] = []

    def add(self, path: str, raw: bytes | bytearray) -> None:
        self._stale.discard(path)
        self._waiting.append(self._hub.CommitOperationAdd(path, bytes(raw)))
        if len(self._waiting) == UPLOADS_AT_ONCE:
            self._upload()

    def finish(self, files: Mapping[str, bytes]) -> None:
        self._upload()
        self._operations += [self._hub.CommitOperationAdd(name, raw) for name, raw in files.items()]
        self._operations += [self._hub.CommitOperationDelete(path) for path in sorted(self._stale)]
        with self._plain_errors():
            done = self._api.create_commit(
                self._repo, self._operations, commit_message="Upload a pack of cake_hf", parent_commit=self._parent
            )
        self.commit = done.oid

    def _upload(self) -> None:
        """Uploads the waiting files ahead of the commit; only each file's name and digest are kept for the commit."""
        if self._waiting:
            with self._plain_errors():
                self._api.preupload_lfs_files(self._repo, self._waiting, num_threads=UPLOADS_AT_ONCE)
        self._operations += self._waiting
        self._waiting = []

    def _plain_errors(self) -> AbstractContextManager[None]:
        return plain_errors(self._repo, "main")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disables the Hub client's progress bars, one per file, which would disrupt ours."""
    utils = hub_client().utils
    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()
