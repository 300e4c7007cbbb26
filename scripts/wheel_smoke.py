"""What a new user would do with the installed package: import it, run its command, restore a prompt. See wheel_check.sh.

    python -I wheel_smoke.py CHECKOUT

Asserts nothing about speed. Needs nothing but what the package declares, so a dependency that was forgotten is found here.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from importlib.util import find_spec
from pathlib import Path
from shutil import which

CHUNK = 32


def main(checkout: Path) -> None:
    """All checks; an assertion says what is wrong."""
    import cake_hf

    home = Path(cake_hf.__file__).resolve().parent
    assert not home.is_relative_to(checkout.resolve()), f"this is the checkout, not the wheel: {home}"
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"not of this environment: {home}"
    assert version("cake-hf") == cake_hf.__version__
    assert (home / "py.typed").is_file(), "type checkers would not look at the package"
    assert requires("cake-hf"), "the wheel declares nothing"
    for extra in ("obstore", "redis", "matplotlib", "datasets", "pytest"):
        assert find_spec(extra) is None, (
            f"{extra} is here, so this environment does not show that the package needs none"
        )
    use_the_codec()
    restore_a_prompt(Path("store"))
    ask_for_a_store_without_its_library()
    use_the_command(home / "assets" / "recall-tiny", Path("command-store"))
    print(f"cake-hf {cake_hf.__version__}: the wheel works in an environment of its own.")


def use_the_codec() -> None:
    """In C where this machine has a compiler, as the wheel was built here."""
    import torch

    from cake_hf.chunks.layout import ChunkLayout, Piece
    from cake_hf.chunks.lossless import decode_into, encode, is_native

    compiler = any(which(name) for name in ("cc", "gcc", "clang"))
    assert is_native() == compiler, "the wheel has no library of the codec" if compiler else "a library from nowhere"
    layout = ChunkLayout(64, (Piece("layers.0.keys", 2, 16, torch.bfloat16),))
    payload = torch.randn(64 * 32).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    encoded, part = encode(payload, layout), memoryview(bytearray(len(payload)))
    decode_into(encoded.bases, encoded.refinements, encoded.sizes, layout, [part])
    assert encoded.sizes.nbytes < len(payload)
    assert part == payload


def restore_a_prompt(store: Path) -> None:
    """Cold, then warm: the same logits as transformers alone, bit for bit."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from cake_hf import CakeCache

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **shape)).eval()
    ids = torch.randint(3, 128, (1, 5 * CHUNK + 3))

    def logits(cache: object, **options: object) -> torch.Tensor:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=4, do_sample=False,
            eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(output.logits)

    oracle = logits(DynamicCache(config=model.config), prefill_chunk_size=CHUNK)
    with CakeCache(model, store, chunk_size=CHUNK) as cold:
        assert torch.equal(logits(cold), oracle)
        assert cold.flush(60)
        assert (cold.report.chunks_computed, cold.report.chunks_saved) == (5, 5), cold.report
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as warm:
        assert torch.equal(logits(warm), oracle)
        assert warm.report.chunks_loaded == 5, warm.report


def use_the_command(model: Path, store: Path) -> None:
    """Its help, and a document into a store with the model that comes with the package."""
    command = str(Path(sys.executable).with_name("cake-hf"))
    told = subprocess.run([command, "--help"], check=True, capture_output=True, text=True).stdout
    assert "warm" in told, told
    text = Path("text.txt")
    text.write_text("Nothing but a line of text that is long enough.\n" * 40, encoding="utf-8")
    subprocess.run([command, "warm", str(model), str(text), "--store", str(store), "--chunk-size", "64"], check=True)
    told = subprocess.run([command, "ls", str(store)], check=True, capture_output=True, text=True).stdout
    assert "recall-tiny" in told, told
    for name, line in (("bench", "python -m benchmarks"), ("demo", "python -m demo")):
        moved = subprocess.run([command, name], capture_output=True, text=True)
        assert (moved.returncode, line in moved.stderr) == (2, True), moved


def ask_for_a_store_without_its_library() -> None:
    """It is found among the entry points of the package that is installed, and says what to install."""
    from cake_hf import StoreError, open_store

    assert "mooncake" in entry_points(group="cake_hf.stores").names
    told = ""
    try:
        open_store("mooncake://127.0.0.1:1")
    except StoreError as error:
        told = str(error)
    assert "cake-hf[mooncake]" in told, told


if __name__ == "__main__":
    main(Path(sys.argv[1]))
