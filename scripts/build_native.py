"""Build the library of the codecs into the package, with the system's C compiler.

    python scripts/build_native.py

Installing the package (from a checkout, editable or not, or from an sdist) runs this, too: it is the build hook of hatchling,
and the wheel is then one for this platform. Without a compiler the wheel is for all platforms, and numpy does what the library
would. CC in the environment chooses the compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, where hatchling is not needed
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent.parent
CHUNKS = ROOT / "src" / "cake_hf" / "chunks"
SOURCES = (CHUNKS / "lossless.c", CHUNKS / "lossy" / "lossy.c")
LIBRARY = CHUNKS / "_native.so"
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""Numbers are the same on every machine: no operation is fused with another one. The others only let loops become vectors."""

LANGUAGE = ("-std=gnu11", f"-I{CHUNKS}", *ARITHMETIC)
FLAGS = (*LANGUAGE, "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


def compiler() -> list[str]:
    """The command of the C compiler, without arguments; empty if there is none."""
    wanted = os.environ.get("CC")
    for command in [shlex.split(wanted)] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    return []


def build(library: Path = LIBRARY) -> Path | None:
    """Build the library and return its path; None, after one line, if that cannot be done here."""
    command = compiler()
    if not command:
        print(f"No C compiler: {library.name} is not built, numpy decodes KV.", file=sys.stderr)
        return None
    made = library.with_name(f"{library.name}.{os.getpid()}")  # a process may have the old one loaded
    try:
        run = subprocess.run([*command, *FLAGS, *map(str, SOURCES), "-o", str(made)], capture_output=True, text=True)
        if run.returncode:
            [reason, *_] = [*run.stderr.splitlines(), "no message"]
            print(f"{library.name} is not built, numpy decodes KV: {reason}", file=sys.stderr)
            return None
        made.replace(library)
    finally:
        made.unlink(missing_ok=True)
    return library


def platform_tag() -> str:
    """The wheel's tag for a library that was built here; it needs nothing of Python itself."""
    from packaging.tags import platform_tags

    many = ("manylinux", "musllinux")  # promises that were not checked
    return f"py3-none-{next(tag for tag in platform_tags() if not tag.startswith(many))}"


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Puts the library into a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        built = build() if platform.system() != "Windows" else None
        if built is not None:
            build_data["artifacts"].append(built.relative_to(ROOT).as_posix())
            build_data["pure_python"] = False
            build_data["tag"] = platform_tag()

    def clean(self, versions: list[str]) -> None:
        LIBRARY.unlink(missing_ok=True)


if __name__ == "__main__":
    print(build() or "Nothing was built.")
