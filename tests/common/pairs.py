"""Code that runs in two processes of one group, as torchrun starts them."""

import os
import subprocess
import sys

# Forks once all is imported, since importing takes longer than all else. Code that makes several
# groups takes a port of its own for each, from `ports`: where a group ends, its first process may
# still listen when the second one comes for the next group.
PAIR = """
import contextlib, io, os, socket, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
{imports}
with contextlib.ExitStack() as free:
    servers = [free.enter_context(socket.create_server(("localhost", 0))) for _ in range(8)]
    ports = [str(server.getsockname()[1]) for server in servers]
os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=ports.pop(), WORLD_SIZE="2")
children = []
for rank in "01":
    if not (child := os.fork()):
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank)
        sys.stdout = io.StringIO()
        exec({code!r}, globals())
        sys.__stdout__.write(sys.stdout.getvalue())  # at once: lines of the two must not mix
        sys.__stdout__.flush()
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def in_two(imports: str, code: str) -> str:
    """What the two printed; fails unless both end well."""
    script = PAIR.format(imports=imports, code=code)
    done = subprocess.run(
        [sys.executable, "-c", script, os.pathsep.join(sys.path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
