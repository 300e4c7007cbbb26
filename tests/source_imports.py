"""The import statements of a source, wherever in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def import_statements(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Each imported module, by its absolute dotted name, and the names taken from it; none for `import module`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*start, *([node.module] if node.module else [])]), [alias.name for alias in node.names]
