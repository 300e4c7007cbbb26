"""Traces of prompts with shared prefixes: read or generated, replayed on the simulator and with a model."""
