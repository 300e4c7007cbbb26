"""Child processes that import no more than they need, past the package's face, and so start in a tenth of a second."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.servers.plain import faceless


def command_of(script: str, *arguments: object, bare: bool = True) -> list[str]:
    """The command line of a child.

    Args:
        script: finds its arguments from `sys.argv[1]` on.
        arguments: as strings.
        bare: without what is installed; half as long to start, and enough for directories.
    """
    return faceless(script, [str(argument) for argument in arguments], ["-I", "-S"] if bare else [])


def start_child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A bare child with pipes to and from it."""
    return subprocess.Popen(command_of(script, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_together(script: str, *calls: Sequence[object]) -> list[subprocess.Popen[str]]:
    """A bare child for each of these arguments. Each says "ready" and reads a line, which comes when all are ready."""
    children = [start_child(script, *arguments) for arguments in calls]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    return children


FORKING = """
import json, traceback
import cake_hf.stores.local  # once for all
body = compile(sys.argv[1], "child", "exec")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv[1:], code = json.loads(line), 1
        try:
            exec(body, {"os": os, "sys": sys})
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def many_children(script: str) -> Iterator[Callable[..., int]]:
    """Gives a function that runs the script in a new process, with these arguments, and returns its exit code.

    The processes are forks of one bare child, so that each takes milliseconds. A signal that ends one is a negative code.
    """
    with start_child(FORKING, script) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, tells = process.stdin, process.stdout

        def run(*arguments: object) -> int:
            told.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            told.flush()
            return int(tells.readline())

        try:
            yield run
        finally:
            told.close()
