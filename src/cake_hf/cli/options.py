"""Arguments and options shared by several commands; groups of options are declared once, as the fields of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import update_wrapper
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.util.environment import STORE


class Dtype(StrEnum):
    """The dtype of the weights, and so of the KV; "auto" is the dtype that they were saved in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Codec(StrEnum):
    """How new chunks are stored, as `CakeCache` takes it."""

    NONE = "none"
    LOSSLESS = "lossless"
    AUTO = "auto"
    NEAR = "near"
    INT8 = "int8"
    QUANTSPEC = "quantspec"
    INT4 = "int4"
    ROT4 = "rot4"
    CACHEGEN = "cachegen"
    KIVI2 = "kivi2"


StoreArgument = Annotated[str, typer.Argument(metavar="STORE", envvar=STORE, help="A store: a directory or a URL.")]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        min=MIN_CHUNK_SIZE, help="Tokens per chunk; part of the key. The default is 128 on a CPU and 512 on a GPU."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="The dtype of the weights, and so of the KV.")]
CodecOption = Annotated[
    Codec,
    typer.Option(
        help="lossless stores bfloat16 KV in about 0.7 of the bytes; auto does, unless the store is in memory. "
        "The others are lossy, and need --no-exact."
    ),
]
Device = Annotated[str, typer.Option(help="E.g. cpu or cuda:1; auto is the GPU if there is one.")]
Boundaries = Annotated[
    list[int] | None,
    typer.Option(
        "--boundary",
        metavar="TOKENS",
        help="A place where the prompt is cut, in tokens from its start, as boundaries= in Python; may be given several times.",
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Place the text in the model's chat template, at the start of the user's first message."
    ),
]
System = Annotated[Path | None, typer.Option(help="With --chat: a text file with the system prompt.")]


@dataclass(frozen=True)
class WarmedOptions:
    """The options with which a document was warmed: all that decides which KV is its own, except its text and the model."""

    chunk_size: ChunkSize = None
    salt: Annotated[str, typer.Option(help="The salt that the KV was saved under.")] = ""
    dtype: DtypeOption = Dtype.AUTO
    device: Device = "auto"
    exact: Annotated[
        bool, typer.Option(help="As when it was warmed; KV saved with --no-exact serves other machines, too.")
    ] = True
    codec: Annotated[Codec, typer.Option(help="The lossy codec that it was warmed with, if it was.")] = Codec.NONE
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Only this many tokens from the start, as when it was warmed.")
    ] = None
    boundary: Boundaries = None
    chat: Chat = False
    system: System = None

    @property
    def keyed(self) -> dict[str, Any]:
        """Returns those options that a session takes; they are part of the chunks' keys."""
        return {
            "chunk_size": self.chunk_size or "auto",
            "salt": self.salt,
            "exact": self.exact,
            "codec": self.codec.value,
        }


def flat_options(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command as typer must see it: a parameter that is a dataclass of options is replaced by its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        single = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        parameters += _fields_of(groups[name]) if name in groups else [single]

    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})  # type: ignore[operator]  # a class
        command(**given)

    update_wrapper(flat, command)
    del flat.__wrapped__  # type: ignore[attr-defined]  # or typer would look there
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what `inspect` goes by
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _fields_of(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )
