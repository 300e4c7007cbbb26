"""Encoded chunks that are decoded where they go, through the place that serves GPUs: the bits are those of the host's decoder.

Copies are as late as they may be (see `late_copies`). Without Triton, the host's decoder stands in for the kernels; with it
(`make test-triton`) each test also runs with these.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, CorruptChunk, Limits, Store
from cake_hf.chunks.encoded_header import parse_encoded_header
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import Encoded, EncodedSizes, decode_base_into, decode_into
from cake_hf.chunks.stored_forms import EncodedPieces, file_of, pieces_of_file
from cake_hf.testing import FaultStore, GateStore
from cake_hf.transfer import device_decoding
from cake_hf.transfer.device_decoding import Trials
from cake_hf.transfer.landing import DevicePlace, Landing
from hanging import no_waiting_for
from late_copies import LateCopies, late_copies
from models import CHUNK, CHUNKS, Outcome, difference, prompt, run
from stored import chunks_of, key_in
from test_lossless_cache import copy_of, expected, model_of
from waiting import PATIENCE, await_true, join_loaders

CPU = torch.device("cpu")
KERNELS = "cake_hf.chunks.lossless_triton"
LIMITS = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE, device_decode_bytes=2**29)
DECODERS = ["the host's", *(["kernels"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]

Decode = Callable[..., torch.Tensor]


def host_decode(
    payload: torch.Tensor,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    places: Sequence[torch.Tensor],
    *,
    near: bool = False,
) -> torch.Tensor:
    """Stands in for `decode_on_device`. The host's decoder does not say which piece is wrong: here it is the first one."""
    bases, rest = (memoryview(part.numpy()) for part in payload.tensor_split([sizes.base_bytes]))
    parts, wrong = [place.numpy().data for place in places], torch.zeros(len(places), dtype=torch.bool)
    try:
        if near:
            encoded = [int(base < place.nbytes) for base, place in zip(sizes.bases, places, strict=True)]
            decode_base_into(bases, EncodedSizes(sizes.bases, tuple(encoded)), layout, parts)
        else:
            decode_into(bases, rest, sizes, layout, parts)
    except CorruptChunk:
        wrong[0] = True
    return wrong


class Decoder:
    """What is imported as the kernels, in the test's stead of a GPU.

    Attributes:
        decode: does the work; a test may replace it.
        calls: whether the bases alone were decoded, of each call.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.calls: list[bool] = []

    def decode_on_device(self, *arguments: Any, near: bool) -> torch.Tensor:
        self.calls.append(near)
        return self.decode(*arguments, near=near)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    decode: Decode = host_decode
    if request.param == "kernels":
        from cake_hf.chunks.lossless_triton import decode_on_device

        decode = decode_on_device
    made = Decoder(decode)
    monkeypatch.setitem(sys.modules, KERNELS, made)
    return made


def tried() -> Trials:
    """Trials of which the one of the CPU is over."""
    trials = Trials()
    trials.run(CPU)
    return trials


@contextmanager
def through(trials: Trials) -> Iterator[None]:
    """All restores in the body go through places that have these trials."""
    with late_copies(type("Tried", (DevicePlace,), {"trials": trials})):
        yield


def restored(store: Store, **options: Any) -> tuple[Outcome, Any]:
    with CakeCache(
        model_of(),
        store,
        **{"chunk_size": CHUNK, "codec": "lossless", "strategy": "load", "save": False, "limits": LIMITS, **options},
    ) as cache:
        outcome = run(model_of(), prompt(), cache)
        return outcome, cache.report


def stored_chunk(index: int = 2) -> tuple[EncodedPieces, ChunkLayout, bytes]:
    """A chunk of the prompt, and what it decodes to."""
    raw = chunks_of(copy_of())[index]
    _, layout = parse_encoded_header(raw)
    pieces = pieces_of_file(memoryview(bytearray(raw)), key_in(raw), layout, len(layout.pieces))
    whole = bytearray(layout.nbytes)
    parts = [memoryview(whole)[end - size : end] for size, end in zip(layout.sizes, ends(layout), strict=True)]
    pieces.decode_into(layout, parts)
    return pieces, layout, bytes(whole)


def ends(layout: ChunkLayout) -> list[int]:
    return [sum(layout.sizes[: n + 1]) for n in range(len(layout.sizes))]


def bare(pieces: EncodedPieces) -> EncodedPieces:
    """The bases alone."""
    return EncodedPieces(pieces.metadata, pieces.count, pieces.bases, memoryview(b""))


def impossible(pieces: EncodedPieces) -> EncodedPieces:
    """With a window in its first piece that no encoder writes."""
    return EncodedPieces(
        pieces.metadata, pieces.count, memoryview(bytearray(b"\0" + pieces.bases[1:])), pieces.refinements
    )


class OnePlace:
    """A place for a single chunk, in zeroed buffers, and its landing."""

    def __init__(
        self, layout: ChunkLayout, trials: Trials, *, rooms: int = 1, staged: bool = False, device: torch.device = CPU
    ) -> None:
        self.buffers = [
            torch.zeros(1, layout.chunk_size, piece.heads, piece.head_dim, dtype=piece.dtype, device=device)
            for piece in layout.pieces
        ]
        with late_copies() if device.type == "cpu" else nullcontext():
            self.place = type("Tried", (DevicePlace,), {"trials": trials})(self.buffers, layout, rooms=rooms)
        self.staged = staged

    def landing(self) -> Landing:
        landing: Landing = self.place.landing(0, staged=self.staged)
        return landing

    def content(self) -> bytes:
        self.place.catch_up()
        return b"".join(buffer.cpu().view(torch.uint8).numpy().tobytes() for buffer in self.buffers)


# The trial.


def test_the_made_up_chunk_has_what_may_go_wrong() -> None:
    """Encoded pieces with many escapes, several tiles in one of them, and a piece that is stored as it is."""
    pieces, layout = device_decoding._made_up()
    sizes = pieces.metadata.sizes
    assert [sizes.is_raw(n, size) for n, size in enumerate(layout.sizes)] == [False, False, False, True]
    for n, (size, channels) in enumerate(zip(layout.sizes[:3], layout.channels[:3], strict=True)):
        assert sizes.bases[n] - channels - size // 2 > 0.2 * size // 2
    assert layout.sizes[0] // 2 > 2 * 4096


def test_a_right_decoder_passes(decoder: Decoder) -> None:
    trials = Trials()
    assert trials.run(CPU) == ""
    assert trials.passed(CPU)
    assert decoder.calls == [False, True, False]


def test_nothing_waits_for_the_trial(decoder: Decoder) -> None:
    gate, decode, trials = threading.Event(), decoder.decode, Trials()

    def gated(*arguments: Any, near: bool) -> torch.Tensor:
        assert gate.wait(PATIENCE)
        return decode(*arguments, near=near)

    decoder.decode = gated
    with through(trials):
        outcome, report = restored(copy_of())
        assert report.chunks_loaded == CHUNKS
        await_true(lambda: len(decoder.calls) == 1)
        [thread] = [thread for thread in threading.enumerate() if thread.name == "cake-decoder-trial"]
        assert not thread.daemon  # Python would abort if it ended while Triton compiles in a daemon
        assert difference(outcome, expected()) == ""
        gate.set()
        await_true(partial(trials.passed, CPU))
        outcome, report = restored(copy_of())
    assert (report.chunks_loaded, len(decoder.calls)) == (CHUNKS, 3 + CHUNKS)
    assert difference(outcome, expected()) == ""


def one_bit(decode: Decode, *arguments: Any, near: bool, of_bases: bool | None = None) -> torch.Tensor:
    """As the decoder, with one bit of the first piece changed."""
    wrong = decode(*arguments, near=near)
    if of_bases is None or of_bases == near:
        arguments[-1][0][-1] ^= 1
    return wrong


def beyond(decode: Decode, *arguments: Any, near: bool) -> torch.Tensor:
    """As the decoder, with one byte written behind a piece."""
    wrong, place = decode(*arguments, near=near), arguments[-1][0]
    place.as_strided((1,), (1,), place.storage_offset() + place.numel())[0] = 7
    return wrong


def content(decode: Decode, *arguments: Any, near: bool) -> torch.Tensor:
    """As the decoder, and finds nothing wrong with any chunk."""
    return torch.zeros_like(decode(*arguments, near=near))


def refuses(decode: Decode, *arguments: Any, near: bool) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


WRONG = {
    "other bits": (one_bit, "It gives other bits than the host."),
    "other bits of bases": (partial(one_bit, of_bases=True), "It gives other bits than the host."),
    "writes beyond": (beyond, "It gives other bits than the host."),
    "takes all": (content, "It does not see what the host refuses."),
    "raises": (refuses, "no kernel image is available"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_decoder_that_is_wrong_is_not_used(kind: str, decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    wrong, complaint = WRONG[kind]
    decoder.decode = partial(wrong, decoder.decode)
    trials = tried()
    asked = len(decoder.calls)
    with through(trials):
        for _ in range(2):
            outcome, report = restored(copy_of())
            assert (report.chunks_loaded, len(decoder.calls)) == (CHUNKS, asked)
            assert difference(outcome, expected()) == ""
    [told] = [record for record in caplog.records if "decoded on the host" in record.message]
    assert complaint in told.message


def test_without_triton_the_host_decodes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    trials = Trials()
    with through(trials):
        for _ in range(2):
            outcome, report = restored(copy_of())
            assert report.chunks_loaded == CHUNKS
            assert difference(outcome, expected()) == ""
    await_true(lambda: "import of triton halted" in caplog.text)
    assert not trials.passed(CPU)
    assert caplog.text.count("decoded on the host") == 1


# Restores.


def test_a_restore_is_exact(decoder: Decoder) -> None:
    with through(tried()):
        before = len(decoder.calls)
        outcome, report = restored(copy_of())
    assert (report.chunks_loaded, len(decoder.calls) - before) == (CHUNKS, CHUNKS)
    assert difference(outcome, expected()) == ""


def test_one_wrong_bit_would_show(decoder: Decoder) -> None:
    """Negative control: the KV does come from the device's decoder."""
    trials = tried()
    decoder.decode = partial(one_bit, decoder.decode)
    with through(trials):
        outcome, report = restored(copy_of())
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, expected()) != ""


def test_a_restore_from_both_ends_is_exact(decoder: Decoder) -> None:
    """Wherever the sides meet, and whichever loads are staged."""
    with through(tried()):
        outcome, report = restored(copy_of(), strategy="both")
    assert report.chunks_loaded + report.chunks_computed == CHUNKS
    assert difference(outcome, expected()) == ""


@pytest.mark.parametrize("codec", ["none", "near"])
def test_caches_of_other_codecs_leave_it_to_the_host(decoder: Decoder, codec: str) -> None:
    trials = tried()
    before = len(decoder.calls)
    with through(trials):
        outcome, report = restored(copy_of(), codec=codec, exact=codec == "none")
    assert len(decoder.calls) == before
    if codec == "none":
        assert report.chunks_loaded == CHUNKS
        assert difference(outcome, expected()) == ""


@pytest.mark.parametrize("room", [{}, {"device_decode_bytes": 1}])
def test_without_room_for_a_chunk_the_host_decodes(decoder: Decoder, room: dict[str, int]) -> None:
    """So it does by default."""
    trials = tried()
    before = len(decoder.calls)
    with through(trials):
        outcome, report = restored(copy_of(), limits=Limits(**room))
    assert (report.chunks_loaded, len(decoder.calls)) == (CHUNKS, before)
    assert difference(outcome, expected()) == ""


# Faults.


@pytest.mark.parametrize("position", [0, CHUNKS - 1])
def test_what_no_encoder_writes_is_computed(decoder: Decoder, position: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its checksums are right."""
    store = copy_of()
    raw = chunks_of(store)[position]
    metadata, layout = parse_encoded_header(raw)
    pieces = impossible(pieces_of_file(memoryview(raw), key_in(raw), layout, len(layout.pieces)))
    forged = file_of(Encoded(pieces.bases, pieces.refinements, metadata.sizes), layout, metadata.facts)
    store.write(key_in(raw), forged, replace=True)
    with through(tried()):
        outcome, report = restored(store)
    assert (report.chunks_loaded, report.chunks_failed, report.chunks_computed) == (CHUNKS - 1, 1, 1)
    assert difference(outcome, expected()) == ""
    assert "Encoded piece 0 is not as the encoder makes it." in caplog.text


@pytest.mark.parametrize("fault", ["flip", "truncate"])
def test_a_damaged_chunk_does_not_get_there(decoder: Decoder, fault: str) -> None:
    store = copy_of()
    with through(tried()):
        before = len(decoder.calls)
        outcome, report = restored(FaultStore(store, {key_in(chunks_of(store)[3]): fault}))
    assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS - 1, 1)
    assert len(decoder.calls) - before == CHUNKS - 1
    assert difference(outcome, expected()) == ""


def test_a_device_that_fails_later_is_left(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    pieces, layout, raw = stored_chunk()
    trials = tried()
    one = OnePlace(layout, trials)
    decoder.decode = partial(refuses, decoder.decode)
    for _ in range(2):
        landing = one.landing()
        assert not landing.decode(pieces)
        pieces.decode_into(layout, landing.parts)
        landing.commit(len(landing.parts))
        landing.release()
        assert one.content() == raw
    assert not trials.passed(CPU)
    assert caplog.text.count("no kernel image is available") == 1


def test_a_late_read_writes_nowhere(decoder: Decoder) -> None:
    class Late(FaultStore):
        """What hangs brings the right chunk in the end."""

        def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
            super().read_into(key, parts)
            return self.inner.read_into(key, parts)

    store = Late(copy_of(), {key_in(chunks_of(copy_of())[3]): "stall"})
    with (
        through(tried()),
        CakeCache(
            model_of(), store, chunk_size=CHUNK, codec="lossless", strategy="load", save=False, limits=LIMITS
        ) as cache,
    ):
        before = len(decoder.calls)
        with no_waiting_for(store):
            outcome = run(model_of(), prompt(), cache)
        assert (cache.report.chunks_failed, cache.report.chunks_loaded) == (1, CHUNKS - 1)
        store.release()
        join_loaders()
        assert len(decoder.calls) - before == CHUNKS - 1
        for layer, keys, values in zip(cache.layers, outcome.keys, outcome.values, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    assert difference(outcome, expected()) == ""


def test_two_prompts_share_what_one_of_them_decodes(decoder: Decoder) -> None:
    gate = GateStore(copy_of())
    found: list[tuple[Outcome, Any]] = []

    def restore() -> None:
        found.append(restored(gate))

    with through(tried()):
        threads = [threading.Thread(target=restore, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(found) == 2
    for outcome, report in found:
        assert (report.chunks_loaded + report.chunks_shared, report.chunks_failed) == (CHUNKS, 0)
        assert difference(outcome, expected()) == ""


# One chunk.


@pytest.mark.parametrize("alone", [False, True], ids=["whole", "bases alone"])
def test_a_chunk_comes_to_its_place(decoder: Decoder, alone: bool) -> None:
    pieces, layout, raw = stored_chunk()
    one = OnePlace(layout, tried())
    assert one.place.decodes
    landing = one.landing()
    assert landing.decode(bare(pieces) if alone else pieces)
    assert decoder.calls[-1] == alone
    landing.commit(len(landing.parts))
    landing.release()
    found = one.content()
    assert (found == raw) != alone
    assert landing.payload().numpy().tobytes() == found  # for others who want it


def test_the_first_pieces_alone(decoder: Decoder) -> None:
    """Of a model with sliding windows: their pieces come last, and are not wanted of this chunk."""
    _, layout, raw = stored_chunk()
    whole, windowed = chunks_of(copy_of())[2], [replace(piece, windowed=True) for piece in layout.pieces[3:]]
    pieces = pieces_of_file(memoryview(bytearray(whole)), key_in(whole), layout, 3)
    one = OnePlace(ChunkLayout(layout.chunk_size, (*layout.pieces[:3], *windowed)), tried())
    landing = one.landing()
    assert len(landing.parts) == 3
    assert landing.decode(pieces)
    landing.commit(3)
    assert one.content() == raw[: sum(layout.sizes[:3])].ljust(layout.nbytes, b"\0")


def test_a_wrong_piece_is_seen_before_anything_is_committed(decoder: Decoder) -> None:
    pieces, layout, _ = stored_chunk()
    landing = OnePlace(layout, tried()).landing()
    with pytest.raises(CorruptChunk, match="Encoded piece 0 is not"):
        landing.decode(impossible(pieces))


def test_what_was_let_go_is_not_decoded(decoder: Decoder) -> None:
    pieces, layout, _ = stored_chunk()
    one = OnePlace(layout, tried())
    before, landing = len(decoder.calls), one.landing()
    landing.let_go()
    assert not landing.decode(pieces)
    assert len(decoder.calls) == before
    assert not any(one.content())


def test_giving_up_does_not_wait_for_the_device(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread gives a load up while its chunk is being decoded, has the device wait, and writes there itself."""
    pieces, layout, raw = stored_chunk()
    one = OnePlace(layout, tried())
    landing, waits, goes_on = one.landing(), threading.Event(), threading.Event()

    def held(event: Any) -> None:
        waits.set()
        assert goes_on.wait(PATIENCE)

    monkeypatch.setattr("late_copies.Event.synchronize", held)
    decoded: list[bool] = []
    loader = threading.Thread(target=lambda: decoded.append(landing.decode(pieces)), daemon=True)
    loader.start()
    assert waits.wait(PATIENCE)
    landing.let_go()
    assert one.content() == raw
    for buffer in one.buffers:
        buffer.fill_(1)
    goes_on.set()
    loader.join(PATIENCE)
    landing.commit(len(landing.parts))
    one.place.catch_up()
    assert decoded == [True]
    assert all((buffer == 1).all() for buffer in one.buffers)


def test_staged_chunks_and_those_beyond_the_rooms_are_decoded_on_the_host(decoder: Decoder) -> None:
    pieces, layout, _ = stored_chunk()
    trials = tried()
    assert not OnePlace(layout, trials, staged=True).landing().decode(pieces)
    one = OnePlace(layout, trials, rooms=1)
    decode = decoder.decode

    def another(*arguments: Any, near: bool) -> torch.Tensor:
        """While this room is taken."""
        assert not one.landing().decode(pieces)
        return decode(*arguments, near=near)

    decoder.decode = another
    assert one.landing().decode(pieces)


def test_a_place_without_rooms_or_on_several_devices_does_not_decode(decoder: Decoder) -> None:
    _, layout, _ = stored_chunk()
    trials = tried()
    assert not OnePlace(layout, trials, rooms=0).place.decodes
    buffers = OnePlace(layout, trials).buffers
    kind = type("Tried", (DevicePlace,), {"trials": trials})
    assert kind(buffers, layout, rooms=1).decodes
    assert not kind([*buffers[:-1], buffers[-1].to("meta")], layout, rooms=1).decodes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "bases alone"])
def test_a_gpu_decodes(alone: bool) -> None:
    device, trials = torch.device("cuda", 0), Trials()
    assert trials.run(device) == ""
    pieces, layout, _ = stored_chunk()
    one = OnePlace(layout, trials, device=device)
    landing = one.landing()
    assert landing.decode(bare(pieces) if alone else pieces)
    landing.commit(len(landing.parts))
    landing.release()
    assert one.content() == landing.payload().numpy().tobytes()


def test_late_copies_are_late() -> None:
    """The stand-in for a stream does nothing on its own."""
    stream, done = LateCopies([]), []
    stream.run(CPU, lambda: done.append(1))
    assert done == []
    stream.catch_up()
    assert done == [1]
