"""Find the layers of a model that may share KV, for `cake_hf.presses.KVSharer`, on texts of one's own.

PYTHONPATH=src python training/share_layers.py --model MODEL --data FOLDER --out shared.json
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cake_hf.presses import KVSharer
from train_less import read_texts, text_options


def main() -> None:
    """Writes the pairs of layers, by the share of layers that was asked for."""
    parser = text_options(__doc__, texts=4, tokens=256)
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--threshold", type=float, default=0.5)
    asked = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    texts = read_texts(asked.data, AutoTokenizer.from_pretrained(asked.model), asked.texts, asked.tokens)
    found = {str(share): KVSharer.calibrated(model, texts, share, asked.threshold).shared for share in asked.share}
    asked.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    for share, pairs in found.items():
        print(f"{share}: {len(pairs)} layers, {', '.join(f'{layer} as {source}' for layer, source in pairs)}")


if __name__ == "__main__":
    main()
