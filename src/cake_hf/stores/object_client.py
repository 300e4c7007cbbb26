"""Sets up the client of an object store, explains its errors, and learns over how many requests a value is best read.

Credentials and endpoints come from the client's usual sources: the environment (AWS_..., GOOGLE_..., AZURE_...), the machine's
role, and for S3 also the profiles in ~/.aws if botocore is installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any, cast

from obstore.store import from_url

from cake_hf.errors import StoreError
from cake_hf.util.forks import Lock
from cake_hf.util.interrupts import is_the_users
from cake_hf.util.redaction import escaped, redacted, scrub, shown, shown_url
from cake_hf.util.urls import refuse_no_server

RETRIES = 3
CONNECT_SECONDS = 5.0
PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}

Credentials = Callable[[], dict[str, Any]]


def connect(url: str, options: Mapping[str, Any], timeouts: tuple[float, ...]) -> list[Any]:
    """Makes clients for one place, one per request timeout. No request is sent yet.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
        options: obstore's options for such a store; they take precedence over the environment.
        timeouts: timeouts of requests in seconds.

    Raises:
        StoreError: no S3 credentials are found.
        Exception: whatever obstore raises for an invalid URL or invalid options.
    """
    scheme, config = url.partition(":")[0], dict(options)
    profile = _aws_profile(config) if scheme == "s3" else None
    transport = _transport(scheme, config)
    return [_client(url, config, profile, transport, seconds) for seconds in timeouts]


def refuse_more_than_a_place(url: str) -> None:
    """Raises unless a URL consists of a bucket and an optional prefix.

    Raises:
        StoreError: it does not; the message quotes nothing that may be a secret.
    """
    scheme, _, rest = url.partition("://")
    bucket = re.split(r"[/?#]", rest)[0]
    # The second condition finds credentials with a / in them.
    if set("@:") & set(bucket) or ("@" in rest and not re.fullmatch("[a-z0-9._-]*", bucket)):
        raise StoreError(f"A URL at {scheme}:// has a bucket and a prefix, and no credentials; {_CREDENTIALS[scheme]}")
    if {"?", "#"} & set(url):
        raise StoreError(
            f"{shown_url(re.split('[?#]', url)[0])} takes no options in its URL; set them in the environment."
        )
    if not bucket:
        raise StoreError(
            f"The store cannot be opened at {scheme}://: no bucket is named; {_WRITE.format(scheme=scheme)}"
        )


def advice(error: BaseException, scheme: str, secrets: tuple[str, ...] = ()) -> str:
    """Returns one sentence on what to do about an error of the client, without the secrets."""
    text = str(error).partition("\n\nDebug source")[0] or type(error).__name__
    for signs, remedy in _REMEDIES:
        if any(sign in text for sign in signs):
            return remedy.format(credentials=_CREDENTIALS[scheme], prefix=PREFIXES[scheme], scheme=scheme)
    # The query of a URL may contain a signature, which must not get into a log.
    said = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", redacted(text, secrets))
    said = escaped(re.sub(r"(<[^>]*>|\s)+", " ", said).strip())
    return f"check the URL and the service, which said: {said[:300]}"


def bucket_is_missing(error: FileNotFoundError) -> bool:
    """Returns whether the bucket is missing, not an object in it; the client raises the same error for both."""
    return any(sign in str(error) for sign in _NO_BUCKET)


def _client(
    url: str, config: dict[str, Any], profile: Credentials | None, transport: dict[str, str], seconds: float
) -> Any:
    connecting = cast(Any, from_url)  # Its overloads only accept options spelled out one by one.
    return connecting(
        url,
        config=config,
        client_options={
            "timeout": timedelta(seconds=seconds),
            "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, seconds)),
            **transport,
        },
        retry_config={
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=seconds / 2),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
        },
        **({"credential_provider": profile} if profile else {}),
    )


def _transport(scheme: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the transport options. Passing any makes the client ignore the environment's, so they are read from there."""
    names = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_ca_certificate", "proxy_excludes")
    found = {name: value for name in names if (value := os.environ.get(f"{PREFIXES[scheme]}_{name.upper()}"))}
    endpoints = [str(config.get(name, "")) for name in ("endpoint", "aws_endpoint", "azure_endpoint")]
    if scheme == "s3":
        endpoints += [os.environ.get(f"AWS_ENDPOINT{end}", "") for end in ("", "_URL", "_URL_S3")]
    for endpoint in filter(None, endpoints):
        try:
            refuse_no_server(endpoint)  # Otherwise the client panics at the first request.
        except ValueError as error:
            raise StoreError(
                f"The endpoint {shown_url(endpoint)} makes no sense: {error}; write it like https://host:9000."
            ) from None
    if any(endpoint.startswith("http://") for endpoint in endpoints):
        found.setdefault("allow_http", "true")  # An explicit http:// is intended.
    return found


def _aws_profile(config: dict[str, Any]) -> Credentials | None:
    """Finds credentials in ~/.aws, a login or the machine's role, if botocore is installed; adds the region to config.

    Returns None if the client already has its credentials, or has to find them by itself.
    """
    told = {"access_key_id", "aws_access_key_id", "skip_signature", "aws_skip_signature"} & set(config)
    if told or os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None
    try:
        session = import_module("botocore.session").Session()
    except ModuleNotFoundError:
        return None
    try:
        credentials, region = session.get_credentials(), session.get_config_variable("region")
    except Exception as error:  # a missing profile, an unreadable file, an expired login
        if is_the_users(error):
            raise
        said = shown(error)
        scrub(error)
        raise StoreError(f"The credentials for S3 cannot be found ({said}); {_CREDENTIALS['s3']}") from error
    if credentials is None:
        raise StoreError(f"There are no credentials for S3; {_CREDENTIALS['s3']}")
    if region:
        config.setdefault("region", region)

    def provide() -> dict[str, Any]:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=15),
        }

    return provide


_WRITE = "write it like {scheme}://bucket/prefix."

_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with botocore installed; for a public bucket set "
    "AWS_SKIP_SIGNATURE=true.",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`.",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or run `az login` and set "
    "AZURE_USE_AZURE_CLI=true.",
}
"""Where credentials come from, by scheme."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")

_REMEDIES = [
    (_NO_BUCKET, "there is no such bucket; make it, or correct the URL."),
    (("169.254.169.254", "metadata.google"), "there are no credentials; {credentials}"),
    (("Account must be specified",), "the storage account is not known; {credentials}"),
    (
        ("401 Unauthorized", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        "the credentials are refused; {credentials}",
    ),
    (("QuotaExceeded", "StorageFull", "507 Insufficient"), "it is full; free some space or choose another bucket."),
    (
        ("403 Forbidden",),
        "access is denied; the credentials need the permission to list, read and write objects there (without that to "
        "list, an object that is not there is denied, too).",
    ),
    (
        ("501 Not",),
        "the service lacks an operation; if it is that of conditional writes, set AWS_CONDITIONAL_PUT=disabled.",
    ),
    (
        ("301 Moved", "PermanentRedirect", "AuthorizationHeaderMalformed"),
        "the bucket is in another region; set AWS_REGION.",
    ),
    (
        ("builder error",),
        "the endpoint makes no sense; correct it, or set {prefix}_ALLOW_HTTP=true for one at http://.",
    ),
    (("500 Int", "502 Bad", "503 Ser", "504 Gat", "429 Too"), "the service is overloaded or out of order; try later."),
    (
        ("error sending request", "timed out", "dns error", "response body"),
        "the service cannot be reached or broke off; check the network, and AWS_ENDPOINT_URL if you set it.",
    ),
    (("not valid for store",), "the client knows no such option; correct its name."),
    (("Unable to recognise URL",), f"the URL makes no sense; {_WRITE}"),
    (("after shutdown", "CancelledError"), "the store is closed; open it again."),
]
"""Explanations of the client's messages, and remedies; the first match counts."""


NEW_WEIGHT = 0.3
"""Weight of the newest read in the smoothed pace of the best number of requests."""

FORGETTING = 0.99
"""Factor on a pace each time another number is chosen, so that it is tried again, the later the slower it was."""


class Spread:
    """Learns from the reads of one store whether half or twice as many requests are faster. Any thread may use it.

    It starts with the most requests and halves them in trials, each of which takes twice as long at worst. With distant object
    storage, where each connection is slow, it stays with the most; with a server nearby it ends at one request.

    A *halving* of h means 2**h times as many bytes per request.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._best = 0
        self._pace: dict[int, float] = {}
        """Seconds per byte, by number of halvings."""

    def halvings(self, most: int) -> int:
        """Returns how often to halve the number of requests for the next value.

        Args:
            most: number of requests without halving.
        """
        with self._lock:
            highest = (most - 1).bit_length()
            best = min(self._best, highest)
            if best not in self._pace:
                return best
            others = [n for n in (best - 1, best + 1) if 0 <= n <= highest]
            choice = min([best, *others], key=lambda n: self._pace.get(n, 0.0))
            for other in others:
                if other != choice and other in self._pace:
                    self._pace[other] *= FORGETTING
            return choice

    def learn(self, halvings: int, nbytes: int, seconds: float) -> None:
        """Records that a value of `nbytes` bytes was read in `seconds`."""
        pace = seconds / nbytes
        with self._lock:
            # After much forgetting, an old pace is less informative than the trial.
            before = self._pace.get(halvings, pace) if halvings == self._best else pace
            self._pace[halvings] = before + NEW_WEIGHT * (pace - before)
            if self._pace[halvings] < self._pace.get(self._best, float("inf")):
                self._best = halvings
