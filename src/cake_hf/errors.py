"""The error types. Every message says what to do about the error."""

from __future__ import annotations

from cake_hf.util.interrupts import is_the_users


class CakeError(Exception):
    """Base class of all errors that cake_hf raises on purpose."""


class StoreError(CakeError):
    """A store cannot be opened, read or written: an I/O fault, a wrong path, a full disk.

    While a prompt is being restored, such errors never reach the caller: the chunk is computed and the fault counted.
    """


class CorruptChunk(StoreError):
    """A value from a store is not the requested chunk: its size, header or checksum is wrong."""


class NewerChunk(CorruptChunk):
    """A value is a chunk of a format or a codec that this version does not know. Nothing is wrong with it, so it stays."""


class DeadlineExceeded(StoreError):
    """A store did not answer within its deadline."""


class UnsupportedModel(CakeError):
    """The model cannot be used with a `CakeCache` at all (meta device, encoder-decoder, a forward without a cache)."""


class UnfitImages(CakeError, ValueError):
    """A prompt has placeholders for more or fewer image tokens than its images have."""


class ForeignModel(CakeError):
    """A cache was passed to a different model than the one it was made for."""


def is_a_fault(error: BaseException) -> bool:
    """Returns whether an error raised by a store counts as the store's fault, as any `Exception` does.

    A client library may also raise errors that are not an `Exception` (a panic in native code, a cancelled task). In the main
    thread these may be the user's Ctrl-C or come from a signal handler; in every other thread only the store can have raised
    them.
    """
    return not is_the_users(error)
