"""What can go wrong, as types. Every message says what to do about it."""

from __future__ import annotations

from cake_hf.util.interrupts import is_the_users


class CakeError(Exception):
    """Base of all errors that cake_hf raises on purpose."""


class StoreError(CakeError):
    """A store cannot be opened, read or written: an I/O fault, a wrong path, a full disk.

    While a prompt is being restored, such errors never reach the caller: the chunk is computed and the fault counted.
    """


class CorruptChunk(StoreError):
    """The value from a store is not the chunk that was asked for: its size, header or checksum is wrong."""


class DeadlineExceeded(StoreError):
    """A store did not answer within its deadline."""


class UnsupportedModel(CakeError):
    """The model cannot be used with a `CakeCache` at all (meta device, encoder-decoder, a forward without a cache)."""


class UnfitImages(CakeError, ValueError):
    """A prompt has places for more or fewer image tokens than its images have."""


class ForeignModel(CakeError):
    """A cache was handed to another model than the one it was made for."""


def is_a_fault(error: BaseException) -> bool:
    """Whether an error that a store raised is its fault, as any `Exception` is.

    A client library may raise others, too (a panic in native code, a cancelled task). In the main thread these may be the
    user's Ctrl-C, or come from a signal handler; in all other threads only the store can have raised them.
    """
    return not is_the_users(error)
