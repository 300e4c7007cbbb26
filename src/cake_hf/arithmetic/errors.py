"""What can go wrong, as types. Every message says what to do about it."""


class CakeError(Exception):
    """Base of all errors that cake_hf raises on purpose."""


class StoreError(CakeError):
    """A store cannot be opened, read or written: an I/O fault, a wrong path, a full disk.

    While a prompt is being restored these never reach the caller: the chunk is computed and the fault counted.
    """


class CorruptChunk(StoreError):
    """What a store returned is not the chunk that was asked for: wrong size, wrong header or wrong checksum."""


class DeadlineExceeded(StoreError):
    """A store did not answer within its deadline."""


class UnsupportedModel(CakeError):
    """A model that no KV cache of ours can serve at all (meta device, encoder-decoder, a forward without a cache)."""


class UnfitImages(CakeError, ValueError):
    """A prompt has places for more or fewer image tokens than its images give."""


class ForeignModel(CakeError):
    """A cache was handed to another model than the one it was made for."""
