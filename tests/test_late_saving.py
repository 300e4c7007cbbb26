"""What is saved is copied out while the model goes on, as late as it may be (see `late_copies`): the same bytes are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, MemoryStore
from families import family_model, here
from family_runs import CHUNKS, IDS, generate
from forwards import before_forward
from late_copies import late_copies
from models import CHUNK
from waiting import PATIENCE

CROPPED = ("llama", "deepseek_v3")
FAMILIES = (*CROPPED, *here("gemma3", "mistral", "qwen3_next", "falcon_h1", "lfm2"))

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these


def go_on(family: str, cache: CakeCache) -> None:
    """Change all that is saved: states by what follows them; KV, where a cache can go back, by another prompt in its place.

    Windows are not written to: for layers of these it shows no more than that all is copied at last.
    """
    model: Any = family_model(family)
    if family in CROPPED:
        cache.prefill(IDS)
        cache.crop(CHUNK - cache.get_seq_length())
        cache.prefill(torch.cat([IDS[:, :CHUNK], IDS[:, CHUNK:].flip(1)], dim=1))
    else:
        generate(model, cache)


def fail_and_go_on(family: str, cache: CakeCache) -> None:
    """A restore that fails after it has saved chunks, behind one that is there; then another prompt in its place."""
    model: Any = family_model(family)

    def fail(forward: int) -> None:
        if forward == 3:
            raise TimeoutError("in the third chunk")

    cache.prefill(IDS[:, :CHUNK], whole=True)
    with pytest.raises(TimeoutError), before_forward(model.model.layers[0], fail):
        cache.prefill(IDS)
    assert cache.get_seq_length() == CHUNK
    cache.prefill(torch.cat([IDS[:, :CHUNK], IDS[:, CHUNK:].flip(1)], dim=1))


def stored(cache: CakeCache, store: MemoryStore) -> dict[str, bytes]:
    assert cache.flush(PATIENCE)
    return {key: store.read(key) or b"" for key in store.keys()}  # noqa: SIM118  # a store is no mapping


def saved(family: str, act: Callable[[str, CakeCache], None] = go_on) -> dict[str, bytes]:
    store = MemoryStore()
    with CakeCache(family_model(family), store, chunk_size=CHUNK, snapshot_every=2) as cache:
        act(family, cache)
        return stored(cache, store)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_stored_however_late_it_is_copied(family: str) -> None:
    plain = saved(family)
    with late_copies():
        assert saved(family) == plain


@pytest.mark.parametrize(
    ("family", "where"), [("llama", "restore"), *[(family, "bound_store") for family in here("qwen3_next")]]
)
def test_saving_without_waiting_for_copies_stores_other_bytes(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the chunks' KV is only awaited where the restore ends, the states' at once."""
    plain, store = saved(family), MemoryStore()
    with late_copies() as copies:
        monkeypatch.setattr(f"cake_hf.restore.{where}.let_copies_out_end", lambda: None)
        with CakeCache(family_model(family), store, chunk_size=CHUNK, snapshot_every=2) as cache:
            go_on(family, cache)
            copies.end()
            late = stored(cache, store)
    assert late.keys() == plain.keys()
    assert late != plain


def test_a_restore_that_fails_leaves_no_copy_under_way() -> None:
    plain = saved("llama", fail_and_go_on)
    assert len(plain) > CHUNKS  # the failed restore has saved, too
    with late_copies():
        assert saved("llama", fail_and_go_on) == plain
