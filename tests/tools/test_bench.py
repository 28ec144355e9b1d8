"""What the benchmarks share: the order of their rows."""

import pytest

from tools.common import bench

NAMES = "abcd"


def orders(rounds: int, warmup: int) -> tuple[list[str], dict[str, list[float]]]:
    """The rows of each round, in the order in which they ran, and what they gave."""
    ran: list[str] = []

    def run(name):
        ran.append(name)
        return float(len(ran))

    samples = bench.interleaved({n: lambda n=n: run(n) for n in NAMES}, rounds, warmup)
    size = len(NAMES)
    return ["".join(ran[i : i + size]) for i in range(0, len(ran), size)], samples


def test_every_row_runs_once_a_round_in_an_order_of_its_own():
    rounds, samples = orders(30, 2)
    assert len(rounds) == 32
    assert {"".join(sorted(each)) for each in rounds} == {NAMES}
    assert {each[0] for each in rounds} == set(NAMES)
    before = {each[each.index("b") - 1] for each in rounds if each[0] != "b"}
    assert before == {"a", "c", "d"}
    assert orders(30, 2)[0] == rounds
    assert list(samples) == list(NAMES)
    for name, values in samples.items():  # of the rounds that count
        places = [4 * n + each.index(name) + 1 for n, each in enumerate(rounds)]
        assert values == places[2:]


def test_ratios_are_within_a_round():
    a, b = bench.rows({"a": [1.0, 10.0, 4.0], "b": [2.0, 5.0, 4.0]}, "a")
    assert (a["ratio"], a["ratio_iqr"]) == (1, 0)
    assert (b["img_per_s"], b["ratio"]) == (4, 1)
    assert b["ratio_iqr"] == pytest.approx(0.75)
    assert b["rates"] == [2, 5, 4]
