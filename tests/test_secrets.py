"""Passwords and tokens, and what a terminal would act on: neither gets into anything that is shown."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from obstore.store import S3Store
from rich.console import Console

from cake_hf import CakeCache, LocalStore, Report, StoreError, open_store
from cake_hf.chunks.codec import METADATA, sealed_header
from cake_hf.cli.look_commands import totals
from cake_hf.stores import MemoryStore, Store, TierStore
from cake_hf.stores.hub import HubSource, parse_hub_name
from cake_hf.stores.object import ObjectStore
from cake_hf.stores.redis import RedisStore
from cake_hf.testing.contract import key_of
from cake_hf.util.redaction import HIDDEN, escaped, redacted, redacted_url, scrub, shown, shown_url
from commands import run_command
from eval.config import RunConfig
from models import CHUNK, prompt, run, shared_model

MARK = "qZx9"
"""Stands between all characters of a secret: where it is seen, at least a part of the secret is."""

KEY = key_of(1)
LOGGER = logging.getLogger("cake_hf")


def secrets() -> st.SearchStrategy[str]:
    """Passwords with all that ends one for who reads a URL by the book."""
    odd = st.sampled_from([*"/@:?#%[]&=+;,!$'\"\\ <>^~|{}.", "ü", "℀", "@/", "://", "%2F", "?a=b@", "@h/"])
    return st.lists(odd, min_size=1, max_size=6).map(lambda parts: MARK + MARK.join(parts) + MARK)


AMBIGUOUS = {
    "redis://user:{}": "@",  # what follows could be the host
    "s3://KEY:{}": "@",
    "redis://127.0.0.1:1/0?{}": "=",  # what stands before it is the name of an option
    "file:///nowhere/kv?budget=1GB&{}": "=",
}
"""Where a character's meaning is not known, these are left out."""

SPECS = [
    "redis://user:{}@127.0.0.1:1/0",
    "redis://:{}@127.0.0.1:1/0",
    "redis://{}@127.0.0.1:1/0",
    "redis://user:{}",
    "redis://127.0.0.1:1/0?password={}",
    "redis://127.0.0.1:1/0?ttl=5&username=me&password={}",
    "redis://127.0.0.1:1/0?passwrd={}",
    "redis://127.0.0.1:1/0?{}",
    "redis://127.0.0.1:1/0#{}",
    "rediss://user:{}@127.0.0.1:1/0?ssl_password={}",
    "redis+unix://:{}@/nowhere/redis.sock?db=0",
    "redis:/user:{}@host/0",
    "redis//user:{}@host/0",
    "Redis://user:{}@host/0",
    "redis:user:{}@host",
    "s3://KEY:{}@bucket/prefix",
    "s3://{}@bucket/prefix",
    "s3:/KEY:{}@bucket/prefix",
    "S3://KEY:{}@bucket/prefix",
    "s3://KEY:{}",
    "s3://bucket/prefix?secret_access_key={}",
    "gs://bucket/prefix?token={}",
    "az://account:{}@container/prefix",
    "az://container/prefix?sig={}",
    "hf://user:{}@org/pack",
    "hf://user:{}@org/pack@main",
    "hf://org/pack?token={}",
    "hf://org/pack@main?token={}",
    "hf:/user:{}@org/pack",
    "mooncake://user:{}@127.0.0.1:1/prefix",
    "mooncake://127.0.0.1:1/prefix?metadata=http://user:{}@127.0.0.1:1/meta",
    "mooncake://127.0.0.1:1/prefix?password={}",
    "mooncake:/user:{}@host",
    "http://user:{}@host/kv",
    "https://host/kv?token={}",
    "gopher://user:{}@host/kv?token={}",
    "file://user:{}@host/kv",
    "file:///nowhere/kv?token={}",
    "file:///nowhere/kv?budget=1GB&{}",
    "/nowhere/kv?password={}",
    "pack:https://user:{}@host/pack",
    "user:{}@host:kv",
    "memory:4GB?token={}",
]


class Seen:
    """All that people get to see while it is open."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def of(self, error: BaseException) -> None:
        """An error, all that it came from, and the traceback."""
        self.texts += traceback.format_exception(error)
        waiting: list[BaseException | None] = [error]
        done: set[int] = set()
        while waiting:
            one = waiting.pop()
            if one is not None and id(one) not in done:
                done.add(id(one))
                self.texts += [str(one), repr(one)]
                waiting += [one.__cause__, one.__context__]


@contextmanager
def seeing() -> Iterator[Seen]:
    """Watch the log, as it would be printed."""
    seen = Seen()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.texts.append(self.format(record))

    handler, level, propagates = Handler(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    try:
        yield seen
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


def use(spec: object, seen: Seen) -> None:
    """Open a store and do with it what is shown to people, by itself and as a tier."""
    try:
        with open_store(spec) as store, open_store(["memory:", store]) as tiers:  # type: ignore[arg-type,list-item]
            seen.texts += [repr(store), str(store), repr(tiers), store.mismatch_reason("0" * 40, dict)]
            assert isinstance(tiers, TierStore)
            for one in (store, tiers):
                for call in (one.check_writable, partial(one.contains, [KEY]), partial(one.read, KEY)):
                    try:
                        call()
                    except StoreError as error:
                        seen.of(error)
                        report = Report(reason=f"the store could not be asked: {error}")
                        seen.texts += [report.reason, str(report), report._repr_html_(), str(report.as_dict())]
            seen.texts += [count.name for count in tiers.counts()]
    except StoreError as error:
        seen.of(error)


@pytest.fixture(autouse=True)
def somebody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials for all stores, and an empty folder to be in."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.mark.fault(
    "Secrets",
    "A password or a token, with any characters in it, stands in any part of a store's URL, or of one that is misspelt.",
    "It is in no name, error, log line, report or table.",
)
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=6, deadline=None)
@example(secret=f"{MARK}/{MARK}")
@example(secret=f"{MARK}@{MARK}/{MARK}?{MARK}=x#{MARK}")
@example(secret=f"{MARK}[{MARK}")
@example(secret=MARK)
@example(secret=f"{MARK}:{MARK}&{MARK}={MARK}")
@example(secret=f"{MARK}&{MARK}")
@given(secret=secrets())
def test_no_part_of_a_secret_is_shown(spec: str, secret: str) -> None:
    for written in {secret, quote(secret, safe="")}:
        if AMBIGUOUS.get(spec, " ") in written:
            continue
        whole = spec.replace("{}", written)
        with seeing() as seen:
            use(whole, seen)
            seen.texts.append(shown_url(whole))
            if "://" in spec:
                seen.texts.append(redacted(f"cannot open {whole.replace(' ', '')}: refused"))
        assert MARK not in "\n".join(seen.texts), [text for text in seen.texts if MARK in text][:3]
    assert os.listdir() == []


@pytest.mark.parametrize("command", ["ls", "info", "verify", "gc"])
@pytest.mark.parametrize("spec", ["redis://user:{}@127.0.0.1:1/0", "s3://KEY:{}@bucket", "hf://user:{}@org/pack"])
def test_commands_do_not_print_a_password(command: str, spec: str) -> None:
    told = run_command(command, spec.format(f"{MARK}/{MARK}"), *(["--budget", "1GB"] if command == "gc" else []))
    assert told.exit_code == 2
    assert MARK not in told.output


def test_tables_and_notes_of_runs_show_the_place_only() -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    from cake_hf.cli.inspect_store import Inventory

    url = f"redis://user:{MARK}@host:6379/0?ttl=5"
    console.print(totals(shown_url(url), Inventory()))
    console.file.close()
    assert "redis://host:6379/0?ttl=5" in console.export_text()
    settings_shown = RunConfig(store=url).for_people()
    assert settings_shown["store"] == "redis://host:6379/0?ttl=5"


# What servers and client libraries say.


@contextmanager
def redis_that_answers(text: str) -> Iterator[int]:
    """A server that answers every command with this error."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client:
            while client.recv(2**16):
                client.sendall(f"-{text}\r\n".encode())

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


HOSTILE = "\x1b[2J\x1b]0;title\x07 \x00 \u202e \u2028 \x85 end"
"""Clears the screen, names the window, reverses what follows, begins lines."""


@pytest.mark.fault(
    "Secrets",
    "A server repeats the password that it was given, or says something that a terminal would act on.",
    "The password is hidden, and control characters are shown as escapes, in errors, logs and reports.",
)
@pytest.mark.parametrize("password", [f"{MARK}-secret", f"{MARK}/p@ss", f"{MARK}%ü[x]"])
def test_what_a_redis_server_repeats_is_hidden(password: str) -> None:
    with (
        redis_that_answers(f"ERR no {password} here {HOSTILE}") as port,
        seeing() as seen,
        RedisStore(f"redis://user:{quote(password, safe='')}@127.0.0.1:{port}/0", timeout=20) as store,
    ):
        use(store, seen)
    assert any("no *** here" in text for text in seen.texts)
    assert MARK not in "\n".join(seen.texts)
    assert_harmless(seen)


def assert_harmless(seen: Seen) -> None:
    """Lines of a traceback apart, each character can be printed."""
    for text in seen.texts:
        plain = text.replace("\n", "").replace("\t", "").replace(" ", " ")
        assert plain.isprintable(), repr(text)


def test_what_the_client_of_an_object_storage_repeats_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{MARK}-of-the-session")
    told = (
        f"Generic error: http://user:{MARK}@host/b?X-Amz-Signature={MARK} key {MARK}-of-options, {MARK}-of-the-session "
        f"Authorization: AWS4 {HOSTILE}"
    )

    def head(client: S3Store, path: str) -> None:
        raise ValueError(told) from OSError(told)

    monkeypatch.setattr(S3Store, "head", head)
    options = {"secret_access_key": f"{MARK}-of-options", "access_key_id": "me", "region": "x"}
    with ObjectStore("s3://bucket/prefix", options=options) as store, seeing() as seen:
        use(store, seen)
    assert any("Generic error" in text for text in seen.texts)
    assert MARK not in "\n".join(seen.texts)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("secret", [MARK, f"{MARK}/{MARK}", f"{MARK}[{MARK}", f"{MARK}#{MARK}", f"{MARK} {MARK}"])
def test_a_login_in_an_endpoint_is_hidden(variable: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, f"http://user:{secret}@127.0.0.1:1")
    with seeing() as seen:
        try:
            with ObjectStore("s3://bucket/prefix", timeout=0.1) as store:
                seen.texts.append(repr(store))
                store.check_writable()
        except StoreError as error:
            seen.of(error)
    assert len(seen.texts) > 2
    assert MARK not in "\n".join(seen.texts)


@pytest.mark.parametrize(
    "endpoint",
    [f"http://user:{MARK}@127.0.0.1:1", f"http://user:{MARK}/x@127.0.0.1:1", f"ftp://u:{MARK}@h", f"http://h:{MARK}"],
)
def test_a_login_in_the_hubs_endpoint_is_hidden(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with seeing() as seen, pytest.raises(StoreError) as caught:
        HubSource("org/pack", endpoint=endpoint, token=f"hf_{MARK}")
    seen.of(caught.value)
    assert "\n" not in str(caught.value)
    assert MARK not in "\n".join(seen.texts)


def test_a_lookup_that_fails_tells_no_secret_in_the_report_or_the_log() -> None:
    class Telling(MemoryStore):
        def contains(self, keys: object) -> list[bool]:
            raise RuntimeError(f"at https://user:{MARK}@host/x?token={MARK}\nERROR forged {HOSTILE} password={MARK}")

        def __repr__(self) -> str:
            return f"Telling('redis://:{MARK}@host')"

    model = shared_model("llama")
    for store in (Telling(), TierStore([Telling()])):
        with seeing() as seen, CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
            run(model, prompt(), cache)
            seen.texts += [cache.report.reason, str(cache.report)]
        assert cache.report.reason_code == "store-not-asked"
        assert any(r"\nERROR forged \x1b[2J" in text for text in seen.texts)
        assert MARK not in "\n".join(seen.texts)
        assert_harmless(seen)
        assert all(
            line.startswith(("the store", "The store", "cake_hf", "Telling")) or "  " in line or "|" in line
            for text in seen.texts
            for line in text.splitlines()
        )


def test_a_models_name_with_a_token_in_it_is_not_stored() -> None:
    model = shared_model("llama")
    before = model.config._name_or_path
    model.config._name_or_path = f"https://user:{MARK}@host/org/model{HOSTILE}"
    try:
        store = MemoryStore()
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            assert cache._session.bound_model.name.startswith("https://host/org/model")
            cache.prefill(prompt())
        values = [bytes(store.read(key) or b"") for key in [*store.keys()]]
        assert values
        assert not any(MARK.encode() in value for value in values)
    finally:
        model.config._name_or_path = before


@pytest.mark.fault(
    "Secrets",
    "A chunk's header names a model with control characters in it.",
    "Commands show them as escapes.",
)
@pytest.mark.parametrize("name", ["\x1b[2J\x07", "line\nforged: all is well", "\u202egnp.exe", f"https://u:{MARK}@h/m"])
def test_a_models_name_in_a_header_is_harmless(name: str, tmp_path: Path) -> None:
    with CakeCache(shared_model("llama"), tmp_path / "kv", chunk_size=CHUNK) as cache:
        cache.prefill(prompt())
    store = LocalStore(tmp_path / "kv")
    for key in [*store.keys()]:
        store.write(key, [renamed(store.read(key) or b"", name)], replace=True)
    for arguments in (["ls", tmp_path / "kv"], ["info", tmp_path / "kv"]):
        told = run_command(*arguments)
        assert told.exit_code == 0
        assert all(line.isprintable() for line in told.output.split("\n"))
        assert not any(line.startswith("forged") for line in told.output.split("\n"))
        assert MARK not in told.output


def renamed(chunk: bytes, model: str) -> bytes:
    """The chunk as one who writes that name of a model into headers would have saved it."""
    start = 8 + int.from_bytes(chunk[:8], "little")
    table = json.loads(chunk[8:start])
    metadata = {**table.pop(METADATA), "model": model}
    del metadata["header"]
    return sealed_header(metadata, table, start) + chunk[start:]


@pytest.mark.parametrize(
    "repo", [f"user:{MARK}@org/pack", f"{MARK}@org/pack", f"org/pack?token={MARK}", f"https://u:{MARK}@h/o/p"]
)
def test_a_login_in_a_repositorys_name_is_hidden(repo: str) -> None:
    for attempt in (lambda: HubSource(repo), lambda: parse_hub_name(repo), lambda: open_store(f"hf://{repo}")):
        with seeing() as seen, pytest.raises(StoreError, match="names no pack") as caught:
            attempt()
        seen.of(caught.value)
        assert MARK not in "\n".join(seen.texts)


def test_an_exceptions_traceback_in_the_log_is_clean() -> None:
    with seeing() as seen:
        try:
            raise ValueError(f"password={MARK}") from OSError(5, f"https://u:{MARK}@h\x1b[2J")
        except ValueError:
            LOGGER.exception("Chunk %s was not carried on in the background.", KEY)
    assert any("Traceback" in text for text in seen.texts)
    said = "\n".join(text for text in seen.texts)
    lines = [line for line in said.splitlines() if not line.startswith("    raise ")]  # the source of this test
    assert MARK not in "\n".join(lines)
    assert "\x1b" not in said


# The functions themselves.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://user:pass@host:6379/0?ttl=5", "redis://host:6379/0?ttl=5"),
        ("redis://host/0?ttl=5&password=x", f"redis://host/0?{HIDDEN}"),
        ("redis://u:p/x@host/0", "redis://host/0"),
        ("redis://u:p?x@host/0", f"redis://{HIDDEN}"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://user:forgotten", f"redis://user:{HIDDEN}"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("s3://KEY:SEC/RET@bucket/x", "s3://bucket/x"),
        ("hf://org/pack@main", "hf://org/pack@main"),
        ("file:///data/kv?budget=50GB&eviction=lru", "file:///data/kv?budget=50GB&eviction=lru"),
        ("file:///C:/kv", "file:///C:/kv"),
        ("/data/a@b", "/data/a@b"),
        ("memory:4GB", "memory:4GB"),
        ("~/.cache/cake_hf", "~/.cache/cake_hf"),
    ],
)
def test_urls_without_their_secrets(text: str, expected: str) -> None:
    assert redacted_url(text) == expected
    assert redacted_url(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("password=abc, next", f"password={HIDDEN}, next"),
        ("{'token': 'abc'}", f"{{'token': {HIDDEN}'}}"),
        ("AWS_SECRET_ACCESS_KEY=abc", f"AWS_SECRET_ACCESS_KEY={HIDDEN}"),
        ("Authorization: Bearer abc", f"Authorization: {HIDDEN}"),
        ("used hf_abcdefghijklmnopqrst here", f"used {HIDDEN} here"),
        ("set AWS_SKIP_SIGNATURE=true.", "set AWS_SKIP_SIGNATURE=true."),
        ("write redis://user:password@host:port/0.", "write redis://user:password@host:port/0."),
        ("the prompt has 5 tokens: less", "the prompt has 5 tokens: less"),
        ("see https://docs.example/page for more", "see https://docs.example/page for more"),
    ],
)
def test_texts_without_their_secrets(text: str, expected: str) -> None:
    assert redacted(text) == expected


@given(st.text())
def test_what_is_shown_is_one_printable_line_and_shown_again_the_same(text: str) -> None:
    once = shown(text)
    assert once.isprintable()
    assert shown(once) == once
    assert escaped(text).isprintable()
    assert escaped(text) == text or not text.isprintable()


def test_redaction_ends_and_never_raises() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    assert shown(Broken()) == "<Broken>"
    assert len(shown("x" * 10**6)) < 5000
    assert len(shown("a:" * 10**5)) < 5000
    endless = ValueError("password=abc")
    endless.__context__ = OSError("x")
    endless.__context__.__context__ = endless
    scrub(endless)
    assert str(endless) == f"password={HIDDEN}"


@pytest.mark.parametrize("store", [MemoryStore()])
def test_arguments_of_log_lines_keep_their_numbers(store: Store) -> None:
    with seeing() as seen:
        LOGGER.warning("%d of %5.1f: %s, %s", 3, 2.5, store, None)
        LOGGER.warning("no arguments \x1b[2J")
        LOGGER.warning("%(name)s", {"name": "a\nb"})
    assert seen.texts[0].startswith("3 of   2.5: ")
    assert seen.texts[1:] == [r"no arguments \x1b[2J", r"a\nb"]
