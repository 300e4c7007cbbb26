"""A streamer for tests."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer


class Collector(BaseStreamer):
    """The prompt and all new tokens, in the order in which they came, and -1 at the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.tokens.append(-1)
