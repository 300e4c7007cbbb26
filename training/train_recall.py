"""Train recall-tiny, the small Llama model that answers questions about hidden facts.

The model exists to show whether a key-value cache is right: each answer is one token
that can only be found through the cached entries of one line far back in the context.
Text comes from the Python standard library, so the training needs no download:

    PYTHONPATH=src python training/train_recall.py --out src/cake_hf/assets/recall-tiny
"""

import argparse
import json
import math
import random
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cake_hf.testing.haystack import KEYS, VALUES, Fact, library_files, question

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1152
MAX_POSITIONS = 32768
IGNORED = -100
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 64.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
"""Waves longer than 128 tokens are stretched until they hardly turn over the longest context.

The short ones find the token before; the long ones match keys, which must look the same
from every distance.  Without the stretch, recall learnt at 2K tokens fails at 8K.
"""
LOOKING_LAYER = 1


@dataclass(frozen=True)
class Stage:
    """A part of the training: sequences of one length, for a share of all steps.

    ``hint`` weighs the losses of ``Hint``; ``cooled`` is the part of the rate left at the end.
    """

    length: int
    batch: int
    share: float
    rate: float
    hint: float = 0.0
    cooled: float = 0.5


@dataclass(frozen=True)
class Batch:
    """Training sequences, and for each token what is known of it."""

    tokens: torch.Tensor
    answers: torch.Tensor
    """Whether the token is the answer to a question."""
    keys: torch.Tensor
    """The key a value or an equals sign belongs to."""
    sources: torch.Tensor
    """For the last token of a question, where the value asked for was stated."""


STAGES = (
    Stage(length=128, batch=16, share=0.32, rate=2e-3, hint=1.0),
    Stage(length=256, batch=8, share=0.11, rate=1.5e-3, hint=0.5),
    Stage(length=512, batch=6, share=0.11, rate=1.5e-3, hint=0.25),
    Stage(length=1024, batch=4, share=0.11, rate=1e-3),
    Stage(length=2048, batch=2, share=0.11, rate=8e-4),
    Stage(length=2048, batch=2, share=0.10, rate=1e-3, hint=1.0),
    Stage(length=4096, batch=1, share=0.04, rate=8e-4, hint=1.0, cooled=0.3),
    Stage(length=1024, batch=4, share=0.08, rate=1.2e-3, hint=0.5, cooled=0.1),
    Stage(length=4096, batch=1, share=0.02, rate=3e-4, hint=0.5, cooled=0.05),
)
"""Short sequences first, as finding a key among few lines is learnt fast; long ones then stretch it.

The last stages alternate: short ones practise recall at little cost, long ones the distance.
"""


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which each word of a fact is one token.

    A newline is always a token of its own, so a text can be put together line by line
    from tokens.  ``ignore_merges`` takes a word found in the vocabulary whole, which
    makes the words of the facts single tokens without merges of their own.
    """
    words = ["remember", "recall", *("Ġ" + word for word in KEYS + VALUES)]
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(words),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = learnt["vocab"]
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    merges = [(left, right) for left, right in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with grouped key-value heads, wide enough to recall and no wider.

    The high rope_theta leaves most of each head nearly unrotated over thousands of
    positions, so that matching a key does not depend on how far back it is.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    model.generation_config = GenerationConfig(
        eos_token_id=[*newline, tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention that keeps what ``Hint`` needs and is fast on a CPU at every length.

    Two plain products beat the fused attention below 1K tokens, where its backward pass is slow.
    """
    heads, length = query.shape[1:3]
    if module.layer_idx == LOOKING_LAYER:
        module.looked_from, module.looked_at = query, key
    keys = key.repeat_interleave(heads // key.shape[1], dim=1)
    values = value.repeat_interleave(heads // key.shape[1], dim=1)
    if length > 1024:
        mixed = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    else:
        future = torch.full((length, length), -1e9, dtype=query.dtype).triu(1)
        flat = (query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
        scores = torch.baddbmm(future, *flat, alpha=scaling)
        mixed = torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view(query.shape)
    return mixed.transpose(1, 2).contiguous(), None


class Haystack:
    """Draws training sequences: library code with facts and questions between its lines."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> None:
        """Tokenize the filler once; a sequence is then a slice of it with lines put in."""
        self.rng = random.Random(seed)
        self.newline: int = tokenizer.encode("\n", add_special_tokens=False)[0]
        self.filler: list[int] = []
        for text in texts:
            self.filler += tokenizer.encode(text.rstrip("\n") + "\n", add_special_tokens=False, verbose=False)
        self.starts = [0] + [i + 1 for i, token in enumerate(self.filler) if token == self.newline]
        fact = tokenizer.encode(Fact(KEYS[0], VALUES[0]).line, add_special_tokens=False)
        asked = tokenizer.encode(question(KEYS[0]), add_special_tokens=False)
        self.stated, self.equals, self.asked = fact[0], fact[2], asked[0]
        self.keys = [tokenizer.encode(" " + key, add_special_tokens=False)[0] for key in KEYS]
        self.values = [tokenizer.encode(" " + value, add_special_tokens=False)[0] for value in VALUES]

    def slice_of_filler(self, size: int) -> list[int]:
        """``size`` tokens of filler from the start of a line, the last one a newline."""
        latest = bisect_left(self.starts, len(self.filler) - size)
        start = self.starts[self.rng.randrange(latest)]
        return [*self.filler[start : start + size - 1], self.newline]

    def places(self, last: int, count: int) -> list[tuple[int, int]]:
        """For each fact, the line it comes before and the line its question comes before.

        Half of all sequences ask everything at the end, as a user would; the others ask
        all along, so that near and far facts are both practised.
        """
        if self.rng.random() < 0.5:
            return [(self.rng.randint(0, last), last) for _ in range(count)]
        pairs = [sorted((self.rng.randint(0, last), self.rng.randint(0, last))) for _ in range(count)]
        return [(first, second) for first, second in pairs]

    def sequence(self, length: int) -> tuple[list[int], list[bool], list[int], list[int]]:
        """The tokens of one sequence with the marks that ``Batch`` explains."""
        most = min(len(KEYS), length // 11)
        count = self.rng.randint(most // 2 if length <= 256 else 12, most)
        keys = self.rng.sample(self.keys, count)
        values = self.rng.choices(self.values, k=count)
        filler = self.slice_of_filler(length - 10 * count)
        cuts = [0] + [i + 1 for i, token in enumerate(filler) if token == self.newline]
        inserts: list[tuple[int, bool, float, int]] = []
        for fact, (first, second) in enumerate(self.places(len(cuts) - 1, count)):
            inserts.append((first, False, self.rng.random(), fact))
            inserts.append((second, True, self.rng.random(), fact))
        tokens: list[int] = []
        answers: list[bool] = []
        noted: list[int] = []
        sources: list[int] = []
        value_at: dict[int, int] = {}
        done = 0
        for line, is_asked, _, fact in sorted(inserts):
            plain = filler[done : cuts[line]]
            done = cuts[line]
            key, ignored = keys[fact], [IGNORED] * len(plain)
            tokens += [*plain, self.asked if is_asked else self.stated, key, self.equals, values[fact], self.newline]
            answers += [*(False for _ in plain), False, False, False, is_asked, False]
            noted += [*ignored, IGNORED, IGNORED, key, key, IGNORED]
            sources += [*ignored, IGNORED, IGNORED, value_at.get(fact, IGNORED), IGNORED, IGNORED]
            value_at.setdefault(fact, len(tokens) - 2)
        rest = filler[done:]
        ignored = [IGNORED] * len(rest)
        return tokens + rest, answers + [False] * len(rest), noted + ignored, sources + ignored

    def batch(self, stage: Stage) -> Batch:
        """A batch of sequences."""
        rows = [self.sequence(stage.length) for _ in range(stage.batch)]
        return Batch(*(torch.tensor(column) for column in zip(*rows, strict=True)))


class Hint(torch.nn.Module):
    """Shows the model where to look; used only early in the training.

    An answer takes two steps: the first layer notes the key beside its value, and a later
    layer finds the note that fits the question.  Neither step lowers the loss without the
    other, so plain training rests on a plateau for long; rewarding both ends it.
    """

    def __init__(self, size: int) -> None:
        """A linear map from the first layer's output to the embedding of the key."""
        super().__init__()
        self.read = torch.nn.Linear(size, size, bias=False)

    def note_loss(self, model: LlamaForCausalLM, noted: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """How badly the keys can be told from the first layer's output ``noted``."""
        known = keys != IGNORED
        normed = functional.rms_norm(noted[known].float(), (noted.shape[-1],))
        logits = model.lm_head(self.read(normed))
        return functional.cross_entropy(logits.float(), keys[known])

    def look_loss(self, model: LlamaForCausalLM, sources: torch.Tensor) -> torch.Tensor:
        """How little half of the heads of one layer look from a question to the value asked for."""
        layer = model.model.layers[LOOKING_LAYER].self_attn
        later = torch.arange(sources.shape[1])
        total = torch.zeros(())
        for query, key, source in zip(layer.looked_from.float(), layer.looked_at.float(), sources, strict=True):
            asked = (source != IGNORED).nonzero().squeeze(1)
            looking = query[: query.shape[0] // 2, asked]
            seen = key[: key.shape[0] // 2].repeat_interleave(2, dim=0)
            scores = looking @ seen.transpose(1, 2) * query.shape[-1] ** -0.5
            scores = scores.masked_fill(later[None, None] > asked[None, :, None], -1e9)
            targets = source[asked].repeat(looking.shape[0])
            total = total + functional.cross_entropy(scores.flatten(0, 1), targets)
        return total / len(sources)


def losses(model: LlamaForCausalLM, hint: Hint, share: float, batch: Batch) -> tuple[torch.Tensor, float]:
    """The loss to minimise, and the share of right answers.

    Answers alone teach the task.  A small loss on a sample of all other tokens makes
    attention to the preceding token form sooner, and makes the model end its answers.
    """
    is_answer, after_answer = batch.answers[:, 1:], batch.answers[:, :-1]
    sampled = (torch.rand(is_answer.shape) < 0.15) | after_answer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.model(batch.tokens[:, :-1], output_hidden_states=share > 0)
        answer_logits = model.lm_head(output.last_hidden_state[is_answer])
        text_logits = model.lm_head(output.last_hidden_state[sampled])
    targets = batch.tokens[:, 1:]
    loss = functional.cross_entropy(answer_logits.float(), targets[is_answer])
    loss = loss + 0.1 * functional.cross_entropy(text_logits.float(), targets[sampled])
    if share:
        noted = hint.note_loss(model, output.hidden_states[1], batch.keys[:, :-1])
        loss = loss + share * (noted + hint.look_loss(model, batch.sources[:, :-1]))
    return loss, (answer_logits.argmax(-1) == targets[is_answer]).float().mean().item()


def schedule(steps: int, skipped: int) -> Iterator[tuple[Stage, float, bool]]:
    """For each step its stage, its learning rate, and whether it is the last of its stage."""
    shares = sum(stage.share for stage in STAGES)
    done = 0
    for stage in STAGES[skipped:]:
        count = max(1, round(steps * stage.share / shares))
        for step in range(count):
            warm = min(1.0, (done + step + 1) / 50)
            cooled = stage.cooled + (1 - stage.cooled) * 0.5 * (1 + math.cos(math.pi * step / count))
            yield stage, stage.rate * warm * cooled, step == count - 1
        done += count


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write what from_pretrained needs; done after each stage, so a cut run is not lost."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)


def train(steps: int, seed: int, out: Path, skipped: int) -> None:
    """Run the stages after the ``skipped`` first, and leave the model in ``out``.

    Where stages are skipped, training goes on from the weights that ``out`` holds.
    """
    torch.manual_seed(seed)
    AttentionInterface.register("recall", attention)
    texts = [text for _, text in library_files("train")]
    tokenizer = build_tokenizer(texts)
    model = build_model(tokenizer)
    if skipped:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(out).state_dict())
    model.set_attn_implementation("recall")
    haystack = Haystack(tokenizer, texts, seed + skipped)
    print(f"{model.num_parameters():,} parameters, {len(haystack.filler):,} tokens of filler", flush=True)
    hint = Hint(model.config.hidden_size)
    optimizer = torch.optim.AdamW([*model.parameters(), *hint.parameters()], betas=(0.9, 0.98), weight_decay=0.01)
    began, right = time.monotonic(), 0.0
    for step, (stage, rate, is_last) in enumerate(schedule(steps, skipped), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, share = losses(model, hint, stage.hint, haystack.batch(stage))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.95 * right + 0.05 * share
        if is_last or step % 50 == 0:
            spent = time.monotonic() - began
            state = f"length {stage.length}  loss {loss.item():.3f}  right {right:.4f}"
            print(f"{spent:6.0f} s  step {step}  {state}", flush=True)
        if is_last:
            save(model, tokenizer, out)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2220, help="steps of all stages together")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and of sequences")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--threads", type=int, default=1, help="threads used by torch")
    parser.add_argument("--skip", type=int, default=0, help="stages already done; goes on from the model in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.seed, arguments.out, arguments.skip)


if __name__ == "__main__":
    main()
