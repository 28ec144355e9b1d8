"""Processes of one run: what they gather, add up and share."""

import ast
import weakref
from pathlib import Path

import pytest
import torch
from pairs import in_two

from scae_dali.training.ranks import Ranks, lost_another, pick_device, together

ROOT = Path(__file__).parents[3]
CODE = """
import torch
from scae_dali.training.ranks import Ranks
ranks = Ranks("cpu")
norm = torch.nn.BatchNorm1d(2)
norm.running_mean += 1 + ranks.rank
ranks.share_buffers(norm)
seen = ranks.gather((ranks.rank, ranks.local, ranks.first, norm.running_mean.tolist()))
total = ranks.sum({"a": 1.0 + ranks.rank, "b": 0.5})
if ranks.first:
    print(seen, total)
ranks.close()
"""


def test_alone_there_is_nothing_to_add_or_share():
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.world, ranks.local, ranks.node) == (0, 1, 0, 0)
    assert ranks.first
    assert ranks.gather("x") == ["x"]
    assert ranks.sum({"a": 2.0}) == {"a": 2.0}
    norm = torch.nn.BatchNorm1d(2)
    ranks.share_buffers(norm)
    ranks.close()


@pytest.mark.parametrize(
    ("told", "node"), [({"GROUP_RANK": "5"}, 5), ({"LOCAL_WORLD_SIZE": "2"}, 1), ({}, 0)]
)
def test_a_process_knows_its_node(monkeypatch, told, node):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name, value in ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | told).items():
        monkeypatch.setenv(name, value)
    assert Ranks("cpu").node == node


def test_two_processes_see_each_others_values_and_the_buffers_of_the_first():
    seen = [(0, 0, True, [1.0, 1.0]), (1, 1, False, [1.0, 1.0])]
    assert in_two(CODE).strip() == f"{seen} {{'a': 3.0, 'b': 1.0}}"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device must be cpu or auto.*got cuda"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", 3) == pick_device("cuda", 3) == torch.device("cuda", 3)
    assert pick_device("cpu") == torch.device("cpu")


SEEN = """
import os
from pathlib import Path
from scae_dali.training.ranks import Ranks, nodes_that_see
os.environ |= dict(GROUP_RANK=os.environ["RANK"], LOCAL_RANK="0")
ranks = Ranks("cpu")
shared, own = Path({folder!r}), Path({folder!r}) / f"node{{ranks.node}}"
seen = ranks.gather((nodes_that_see(shared, ranks), nodes_that_see(own, ranks)))
try:
    nodes_that_see(Path({folder!r}) / "file" if ranks.node else own, ranks)
except ValueError as error:
    seen = ranks.gather(str(error)[-40:]), seen
if ranks.first:
    print(seen)
    print(os.listdir(shared), os.listdir(own))
ranks.close()
"""


def test_nodes_find_out_which_see_the_same_folder(tmp_path):
    (tmp_path / "file").touch()
    said = in_two(SEEN.format(folder=str(tmp_path)))
    errors, seen = ast.literal_eval(said.splitlines()[0])
    assert seen == [([0, 1], [0]), ([0, 1], [1])]
    assert len(errors) == 2  # in both, though it is the second that cannot write
    assert all("file" in error for error in errors)
    assert ".node" not in said


LOST = """
import os, sys
from scae_dali.training.ranks import Ranks, lost_another
ranks = Ranks("cpu")
if not ranks.first:
    sys.stdout.flush()
    os._exit(0)
try:
    ranks.gather("x")
except RuntimeError as error:
    print(lost_another(error))
"""


def test_a_rank_is_told_when_another_has_ended():
    assert in_two(LOST).strip() == "True"
    assert not lost_another(RuntimeError("CUDA out of memory"))
    assert lost_another(torch.distributed.DistBackendError("NCCL error"))


def test_an_error_of_a_step_holds_nothing_of_its_frames():
    """Such as an open cache, which would keep others from writing."""
    held = []

    def fail():
        held.append(weakref.ref(mine := Ranks("cpu")))
        raise ValueError(f"no, {mine.rank}")

    with pytest.raises(ValueError, match="no, 0"):
        together(Ranks("cpu"), fail)
    assert held[0]() is None
