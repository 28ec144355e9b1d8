"""Processes of one run: what they gather, add up and share."""

from pathlib import Path

import pytest
import torch
from pairs import in_two

from scae_dali.training.ranks import Ranks, pick_device

ROOT = Path(__file__).parents[3]
IMPORTS = "import torch\nfrom scae_dali.training.ranks import Ranks"
CODE = """
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
    assert in_two(IMPORTS, CODE).strip() == f"{seen} {{'a': 3.0, 'b': 1.0}}"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device must be cpu or auto.*got cuda"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", 3) == pick_device("cuda", 3) == torch.device("cuda", 3)
    assert pick_device("cpu") == torch.device("cpu")
