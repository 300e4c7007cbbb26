"""Measure how often recall-tiny answers rightly, by length of the context.

The filler is library source that was kept out of the training.  Each context holds
twelve facts and is run once; each question then goes on from the cached context, so
the cache is measured together with the model:

    PYTHONPATH=src python training/eval_recall.py src/cake_hf/assets/recall-tiny
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cake_hf.layers.compat import named_for
from cake_hf.testing.haystack import Fact, hide, make_facts, question, real_text

LENGTHS = (512, 1024, 2048, 4096, 8192)
FACTS = 12


def make_context(tokenizer: PreTrainedTokenizerBase, filler: str, length: int, seed: int) -> tuple[str, list[Fact]]:
    """A text of close to, and not over, ``length`` tokens with ``FACTS`` facts at random places."""
    rng = random.Random(seed)
    facts = make_facts(FACTS, seed)
    room = length - 5 * (FACTS + 1)
    start = filler.index("\n", rng.randrange(len(filler) - 8 * room)) + 1
    excerpt = filler[start : start + 8 * room]
    ids = tokenizer.encode(excerpt, add_special_tokens=False, verbose=False)[:room]
    return hide(tokenizer.decode(ids), facts, seed=seed), facts


def count_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, facts: Sequence[Fact]) -> int:
    """How many facts the model recalls, each question asked right after the same context."""
    ids = tokenizer(context, add_special_tokens=False, return_tensors="pt").input_ids
    cache = DynamicCache(config=model.config)
    model(ids, use_cache=True, logits_to_keep=1, **named_for(model, cache))
    right = 0
    for fact in facts:
        asked = tokenizer(question(fact.key), add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(asked, use_cache=True, logits_to_keep=1, **named_for(model, copy.deepcopy(cache))).logits
        right += tokenizer.decode(logits[0, -1].argmax()) == fact.answer
    return right


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, contexts: int) -> float:
    """The share of right answers over all facts of ``contexts`` contexts."""
    filler = real_text(3_000_000, "held-out")
    right = 0
    for seed in range(contexts):
        context, facts = make_context(tokenizer, filler, length, seed)
        right += count_right(model, tokenizer, context, facts)
    return right / (contexts * FACTS)


def main() -> None:
    """Read the command line, measure, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--contexts", type=int, default=20, help="contexts at each length, twelve questions each")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="context lengths in tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="threads used by torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    result: dict[str, float] = {}
    for length in arguments.lengths:
        began = time.monotonic()
        result[str(length)] = round(accuracy(model, tokenizer, length, arguments.contexts), 4)
        print(f"{length:6d} tokens  {result[str(length)]:7.2%}  {time.monotonic() - began:5.0f} s", flush=True)
    print(json.dumps({"dtype": arguments.dtype, "questions": arguments.contexts * FACTS, "accuracy": result}))


if __name__ == "__main__":
    main()
