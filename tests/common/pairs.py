"""Code that runs in two processes of one group, as torchrun starts them."""

import socket
from contextlib import ExitStack

from forks import Script, run_forked


def in_two(code: str) -> str:
    """What the two printed, the first one first; fails unless both end well.

    Code that makes several groups takes a port of its own for each, from `ports`: where a group
    ends, its first process may still listen when the second one comes for the next group.
    """
    with ExitStack() as free:
        servers = [free.enter_context(socket.create_server(("localhost", 0))) for _ in range(8)]
        ports = [str(server.getsockname()[1]) for server in servers]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": ports[0], "WORLD_SIZE": "2"}
    both = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    done = run_forked(*(Script(code, (), one, {"ports": ports[1:]}) for one in both), timeout=120)
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stderr for one in done)
    return "".join(one.stdout for one in done)
