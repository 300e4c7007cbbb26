"""Floor 1: how a chunk lies in memory and at rest, and what identifies a model. torch, safetensors format, xxhash."""
