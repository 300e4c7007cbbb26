"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cake_hf.arithmetic.environment import STORE
from cake_hf.arithmetic.limits import MIN_CHUNK_SIZE


class Dtype(StrEnum):
    """The dtype of the weights, and so of the KV; "auto" is the one they were saved in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


StoreArgument = Annotated[str, typer.Argument(metavar="STORE", envvar=STORE, help="A store: a directory or a URL.")]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        min=MIN_CHUNK_SIZE, help="Tokens per chunk; part of the key. By default 128 on a CPU and 512 on a GPU."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the weights, and so of the KV.")]
Device = Annotated[str, typer.Option(help="E.g. cpu or cuda:1; auto is the GPU where there is one.")]
