"""A pack on the Hugging Face Hub: pinned to one commit when it is opened, and read by ranges on demand.

All requests go through the Hub client's own session, with its conventions for endpoint, token, proxies, offline mode and
timeouts (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT). Its file cache is not used: it would download a whole
file before the first byte is available, and it accepts a damaged file of the right size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from cake_hf.errors import CakeError, CorruptChunk, StoreError
from cake_hf.stores.base import total_bytes
from cake_hf.stores.manifest import MANIFEST
from cake_hf.stores.pack import PackSource, PackStore
from cake_hf.util.interrupts import is_the_users
from cake_hf.util.redaction import scrub, shown, shown_url
from cake_hf.util.urls import refuse_no_server

SCHEME = "hf://"

_URL = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s@:?*\[\\^~#%&=]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubSource(PackSource):
    """The files of one commit of a repository on the Hub.

    Args:
        repo: "org/name".
        revision: a branch, a tag or a commit; it is resolved once, here.
        endpoint: the Hub's endpoint; by default as the Hub client finds it (HF_ENDPOINT).
        token: the user's token; by default as the Hub client finds it (HF_TOKEN, `hf auth login`).

    Attributes:
        commit: 40 hexadecimal digits, which identify the same bytes whatever happens to the repository.

    Raises:
        StoreError: there is no such pack, it may not be read, the Hub cannot be reached, or the name is invalid.
    """

    range_seconds = 0.1  # two requests: the Hub first answers with the address of the file

    def __init__(
        self, repo: str, revision: str = "main", *, endpoint: str | None = None, token: str | None = None
    ) -> None:
        self._hub = hub_client()
        self.repo, self._revision = parse_hub_name(f"{repo}@{revision}")
        self._endpoint = endpoint or self._hub.constants.ENDPOINT
        try:
            refuse_no_server(self._endpoint)
        except ValueError as error:
            raise StoreError(
                f"The Hub's endpoint {shown_url(self._endpoint)} makes no sense: {error}; correct HF_ENDPOINT."
            ) from None
        self._secrets = (token,) if token else ()
        with self._plain_errors():
            self._headers = self._hub.utils.build_hf_headers(token=token, library_name="cake_hf")
            self.commit = revision if _COMMIT.fullmatch(revision) else self._look_up(token)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.commit}"

    def manifest(self, most: int) -> bytes:
        found = bytearray()
        with self._plain_errors(), self._response(MANIFEST, {}) as response:
            for block in response.iter_raw():
                found += block
                if len(found) > most:
                    break
        return bytes(found)

    def fetch(self, path: str, parts: Sequence[memoryview], offset: int) -> None:
        target, errors = _Scattering(parts), self._hub.errors
        with self._plain_errors():
            try:
                self._stream(path, target, offset)
            except (CakeError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
                raise  # a retry would get the same answer
            except Exception as error:
                if is_the_users(error):
                    raise
                # The connection broke: resume once where it broke. Further retries are up to the caller, who may compute.
                self._stream(path, target, offset)

    def _plain_errors(self) -> AbstractContextManager[None]:
        return plain_errors(self.repo, self._revision, self._secrets)

    def _look_up(self, token: str | None) -> str:
        timeout = self._hub.constants.HF_HUB_ETAG_TIMEOUT
        api = self._hub.HfApi(endpoint=self._endpoint, token=token, library_name="cake_hf")
        commit = str(api.repo_info(self.repo, revision=self._revision, timeout=timeout).sha)
        if not _COMMIT.fullmatch(commit):
            raise StoreError(f"The Hub names no commit for {self.repo}@{self._revision}; give one of 40 digits.")
        return commit

    def _stream(self, path: str, target: _Scattering, offset: int) -> None:
        """Continues where the target stands; requests and accepts no more bytes than it needs."""
        start = offset + target.filled
        with self._response(path, {"Range": f"bytes={start}-{offset + target.wanted - 1}"}) as response:
            whole = response.status_code == 200 and start == 0
            if not whole and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise StoreError(f"The Hub did not send the range of {path} of {self} that it was asked for.")
            for block in response.iter_raw():
                target.take(block)
        if target.filled < target.wanted:
            raise CorruptChunk(f"The file {path} of {self} is cut short.")

    @contextmanager
    def _response(self, path: str, headers: dict[str, str]) -> Iterator[Any]:
        """Yields the response to a GET, its body not read yet. The client does not forward the token to another host."""
        url = self._hub.hf_hub_url(self.repo, path, revision=self.commit, endpoint=self._endpoint)
        with self._hub.get_session().stream(
            "GET",
            url,
            headers={**self._headers, "Accept-Encoding": "identity", **headers},
            follow_redirects=True,
            timeout=self._hub.constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            self._hub.utils.hf_raise_for_status(response)
            yield response


class _Scattering:
    """Buffers that are filled in order, from blocks of any size."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = [part for part in parts if part.nbytes]
        self._at = 0  # offset in the first part
        self.filled = 0
        self.wanted = total_bytes(parts)

    def take(self, block: bytes) -> None:
        if len(block) > self.wanted - self.filled:
            raise CorruptChunk("The Hub sent more bytes than it was asked for.")
        rest = memoryview(block)
        while rest:
            part = self._parts[0]
            count = min(part.nbytes - self._at, len(rest))
            part[self._at : self._at + count] = rest[:count]
            self._at, self.filled, rest = self._at + count, self.filled + count, rest[count:]
            if self._at == part.nbytes:
                self._parts.pop(0)
                self._at = 0


def parse_hub_name(text: str) -> tuple[str, str]:
    """Returns repository and revision of `hf://org/pack@revision`; the scheme and the revision (then "main") are optional.

    Raises:
        StoreError: the text is not such a name.
    """
    found = _URL.fullmatch(text)
    if found is None:
        whole = text if "://" in text else f"{SCHEME}{text}"
        raise StoreError(
            f"'{shown_url(whole)}' names no pack; write it like hf://org/pack or hf://org/pack@revision (a token comes from "
            "`hf auth login` or HF_TOKEN)."
        )
    return found["repo"], found["revision"] or "main"


def open_hub_pack(url: str) -> PackStore:
    """Opens a pack on the Hub, `hf://org/pack@revision`, as a store. A commit of 40 digits always means the same bytes.

    Raises:
        StoreError: there is no such pack, it may not be read, or the Hub cannot be reached.
    """
    return PackStore(HubSource(*parse_hub_name(url)))


def hub_client() -> Any:
    """Returns the module `huggingface_hub`.

    Raises:
        StoreError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils  # not loaded by the package itself
    except ImportError as error:
        raise StoreError('Packs on the Hub need its client: pip install "cake-hf[hub]".') from error
    return huggingface_hub


@contextmanager
def plain_errors(repo: str, revision: str, secrets: Sequence[str] = ()) -> Iterator[None]:
    """Turns errors of the Hub client in the body into StoreErrors of one sentence.

    Args:
        repo, revision: the repository and revision that the body works on.
        secrets: secrets that must not appear in messages, besides those of the environment.
    """
    try:
        yield
    except CakeError:
        raise
    except Exception as error:
        if is_the_users(error):
            raise
        secrets = (*secrets, *filter(None, [hub_client().get_token()]))
        said = shown(_sentence(error, shown_url(repo), shown_url(revision)), secrets)
        scrub(error, secrets)
        raise StoreError(said) from error


def _sentence(error: Exception, repo: str, revision: str) -> str:
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload's error is wrapped
    errors = hub_client().errors
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    known = {
        errors.OfflineModeIsEnabled: "The Hub client is offline (HF_HUB_OFFLINE); pull the pack into a store while online.",
        errors.GatedRepoError: f"The repository {repo} is gated; ask for access on its page and {log_in}.",
        errors.RepositoryNotFoundError: f"There is no repository {repo}, or you may not see it; check the name, or {log_in}.",
        errors.RevisionNotFoundError: f"The repository {repo} has no revision {revision}; check it on its page.",
        errors.EntryNotFoundError: f"{repo}@{revision} is no whole pack: a file is not there; check the name and the revision.",
        errors.HFValidationError: f"'{repo}' is no name of a repository; write it like org/pack.",
    }
    for kind, sentence in known.items():
        if isinstance(error, kind):
            return sentence
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return f"The Hub refuses {repo} to you (status {status}); {log_in}, with a token that may do this."
    if status:
        return f"The Hub answered for {repo} with status {status}; try again later."
    what = next(iter(str(error).strip().splitlines()), "")
    return (
        f"Talking to the Hub about {repo} failed ({type(error).__name__}: {what}); check the network and HF_ENDPOINT."
    )
