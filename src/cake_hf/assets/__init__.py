"""What comes with the package and is no code: a tiny model."""

from pathlib import Path

RECALL_TINY = Path(__file__).parent / "recall-tiny"
"""The model that comes with the package: it recalls facts hidden in a long text. Its name will do wherever a model's does."""
