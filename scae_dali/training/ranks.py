"""The processes of a run: this one among those that torchrun started, or alone without it."""

import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

_POLL_S = 0.5
# As an argument: /usr/bin/torchrun, -m torch.distributed.run, …/torch/distributed/run.py
_TORCHRUN = re.compile(
    r"(^|/)torchrun$|^torch\.distributed\.(run|launch)$|torch/distributed/run\.py$"
)


def pick_device(name: str, number: int = 0) -> torch.device:
    """The device for `cuda`, the GPU of this number; `cpu`; or `auto`, the GPU if there is one."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ValueError("device must be cpu or auto where torch sees no GPU, got cuda")
    return torch.device("cuda", number) if cuda and name != "cpu" else torch.device("cpu")


class Ranks:
    """This process among those of a run.

    rank: its number among all; world: how many there are. local: its number on this node, whose
    process 0 writes the node's cache. node: the number of this node.

    device: see pick_device. number: of the GPU of a process that is alone; among several, each
    takes the GPU of its number on the node. Joins the process group that the environment of
    torchrun names: by NCCL where tensors are on GPUs, by gloo where they are on the CPU. Under
    torchrun the process ends when torchrun does: a killed torchrun would leave its processes
    behind, and they would train on.
    """

    def __init__(self, device: str = "auto", number: int = 0) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        a_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.node = int(os.environ.get("GROUP_RANK", self.rank // a_node))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent()
        self.device = pick_device(device, self.local if self.world > 1 else number)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in every rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(values, value)
        return values

    def by_first(self, step: Callable[[], object]) -> None:
        """Take a step in rank 0 alone, see `together`."""
        together(self, step if self.first else None)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """The sum over the ranks, for each name. Every rank calls it with the same names."""
        every = self.gather(values)
        return {key: sum(one[key] for one in every) for key in values}

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the ranks, on its device, without a gradient. Every rank must
        call it. The CPU does not wait for the device."""
        value = value.detach().clone()
        if self.world > 1:
            distributed.all_reduce(value)
        return value / self.world

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0 (BatchNorm's statistics differ between ranks)."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def close(self) -> None:
        if self.world > 1:
            distributed.barrier()  # gloo of older torch hangs now and then without it
            distributed.destroy_process_group()


def together(ranks: Ranks, step: Callable[[], object] | None) -> None:
    """Take a step in the ranks that have one. If it raises ValueError or OSError in any rank, all
    raise ValueError, so that none waits for one that has ended. Every rank calls it."""
    failed: Exception | None = None
    try:
        if step is not None:
            step()
    except (ValueError, OSError) as error:
        failed = error
    said = [text for text in ranks.gather(None if failed is None else str(failed)) if text]
    try:
        if isinstance(failed, ValueError):
            raise failed
        if said:
            raise ValueError(said[0] if failed is None else str(failed)) from failed
    finally:
        failed = None  # it would keep itself, and what its frames hold, such as an open cache


def nodes_that_see(folder: Path, ranks: Ranks) -> list[int]:
    """The nodes that see this node's folder under the same path, this one too, ascending.

    Every rank calls it. The folder is made. Raises ValueError in all of them where a node cannot
    write to it.
    """
    nodes = ranks.gather(ranks.node)
    if len(set(nodes)) == 1:
        return [ranks.node]
    names = [
        f".node-{node}-{name}"
        for node, name in zip(nodes, ranks.gather(secrets.token_hex(8)), strict=True)
    ]
    mine = folder / names[ranks.rank]

    def leave() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mine.touch()

    try:
        together(ranks, leave)
        seen = {node for node, name in zip(nodes, names, strict=True) if (folder / name).exists()}
        ranks.gather(None)  # no rank removes its file before all have looked
    finally:
        with suppress(OSError):  # it is not there, nor may the folder be
            mine.unlink()
    return sorted(seen)


def lost_another(error: BaseException) -> bool:
    """Whether an error of a collective call says that another rank has ended, or never came."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def end_with_parent() -> None:
    """Start a thread that ends this process at once when its parent is gone, or the torchrun above
    it: a script between the two may outlive torchrun."""
    parent, agent = os.getppid(), _torchrun()
    number = parent if agent is None else agent[0]

    def lives() -> bool:
        if os.getppid() != parent or agent is None:
            return os.getppid() == parent
        process = _process(agent[0])
        return process is not None and process[1] == agent[1]  # not another process with its number

    def watch() -> None:
        while lives():
            time.sleep(_POLL_S)
        try:
            print(
                f"error: process {number}, which started this one, is gone: it ends too; run the "
                "command again to go on (train.py with --resume)",
                file=sys.stderr,
                flush=True,
            )
        finally:  # also if stderr is closed
            os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _torchrun() -> tuple[int, str] | None:
    """The nearest process above this one that is torchrun: its number and when it started; None
    where /proc shows none."""
    number = os.getppid()
    while number > 1 and (process := _process(number)) is not None:
        if any(map(_TORCHRUN.search, _command(number)[:6])):  # the script's own arguments follow
            return number, process[1]
        number = process[0]
    return None


def _process(number: int) -> tuple[int, str] | None:
    """The number of the process above this one, and when this one started; None where it has
    ended."""
    try:
        with open(f"/proc/{number}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # its name may hold anything
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _command(number: int) -> list[str]:
    try:
        with open(f"/proc/{number}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").split("\0")
    except OSError:
        return []
