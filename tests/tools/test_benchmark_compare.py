"""What got slower between two results of a benchmark, beyond noise."""

import json
import re

import numpy as np
import pytest
from conftest import run

NAMES = ["none, threads 1", "scae, threads 1", "none, threads 2", "scae, threads 2"]


def write(path, rates, seed, machine=1.0, noise=0.01, **more):
    """A result with rows of these rates. Every round has a speed of its own, for all rows."""
    random = np.random.default_rng(seed)
    speed = machine * random.uniform(0.7, 1.3, size=9)
    measured = {
        name: rate * speed * random.normal(1, noise, size=9)
        for name, rate in zip(NAMES, rates, strict=True)
    }
    rows = []
    for name, values in measured.items():
        ratios = values / measured["none" + name[4:]]
        low, high = np.quantile(ratios, [0.25, 0.75])
        row = {"name": name, "img_per_s": float(np.median(values)), "iqr": 1.0}
        row |= {"ratio": float(np.median(ratios)), "ratio_iqr": float(high - low)}
        rows.append(row | {"rates": values.round(1).tolist()})
    path.write_text(json.dumps({"rows": rows, "settings": {"batch": 8}} | more))
    return path


def verdicts(out):
    return {row["name"]: row["verdict"] for row in json.loads(out.read_text())["rows"]}


def compare(tmp_path, *files, status=0, **options):
    out = tmp_path / "out.json"
    more = [text for name, value in options.items() for text in (f"--{name}", value)]
    told = run("benchmark", "--compare", *files, "--json", out, *more, status=status)
    return told, verdicts(out)


def test_equal_code_on_a_machine_that_slows_down(tmp_path):
    for seed in range(5):
        one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 2 * seed)
        two = write(tmp_path / "2.json", [1000, 950, 1800, 1700], 2 * seed + 1, machine=0.95)
        found = compare(tmp_path, one, two)[1]
        assert found["scae, threads 1"] == found["scae, threads 2"] == "same"


def test_a_row_that_got_slower_and_one_that_got_faster(tmp_path):
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0)
    two = write(tmp_path / "2.json", [1000, 880, 1800, 1790], 1)
    told, found = compare(tmp_path, one, two, status=1)
    assert found["scae, threads 1"] == "slower"
    assert found["scae, threads 2"] == "faster"
    assert "1 of 4 rows got slower" in told
    assert compare(tmp_path, one, two, tolerance=0.2)[1]["scae, threads 1"] == "same"
    assert compare(tmp_path, two, one, status=1)[1]["scae, threads 1"] == "faster"


def test_a_change_within_the_noise_is_none(tmp_path):
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0, noise=0.1)
    two = write(tmp_path / "2.json", [1000, 930, 1800, 1700], 1, noise=0.1)
    assert compare(tmp_path, one, two)[1]["scae, threads 1"] == "same"


def test_several_files_of_each_side(tmp_path):
    """Two starts that differ by themselves: each side has both kinds."""
    files = []
    for k, (share, machine) in enumerate([(0.95, 1), (0.9, 1), (0.9, 1), (0.95, 1)]):
        rates = [1000, 1000 * share, 1800, 1800 * share]
        files.append(write(tmp_path / f"{k}.json", rates, k, machine=machine))
    assert compare(tmp_path, *files[:2], status=1)[1]["scae, threads 1"] == "slower"
    assert compare(tmp_path, *files)[1]["scae, threads 1"] == "same"


def test_rates_themselves(tmp_path):
    """The baseline got faster with the rest, which the ratios do not show."""
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0, machine=1)
    two = write(tmp_path / "2.json", [2000, 1900, 3600, 3400], 0, machine=1)
    assert compare(tmp_path, one, two)[1]["scae, threads 1"] == "same"
    out = tmp_path / "out.json"
    told = run("benchmark", "--compare", one, two, "--absolute", "--json", out)
    assert set(verdicts(out).values()) == {"faster"}
    assert "0 of 4 rows got slower" in told


def test_files_that_differ_otherwise_are_told(tmp_path):
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0, hardware={"cores": 2})
    two = write(
        tmp_path / "2.json", [1000, 950, 1800, 1700], 1, hardware={"cores": 4}, settings={"rows": 1}
    )
    told = compare(tmp_path, one, two)[0]
    assert re.search(r"2\.json has other hardware than .*1\.json: cores", told)
    assert re.search(r"2\.json has other settings than .*1\.json: batch, rows", told)


def test_what_cannot_be_told_is_no_verdict(tmp_path):
    """Rounds that are too few or no numbers, two rows of one name, another baseline."""
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0)
    content = json.loads(one.read_text())

    def refused(change):
        change(other := json.loads(one.read_text()))
        (tmp_path / "2.json").write_text(json.dumps(other))
        return run("benchmark", "--compare", one, tmp_path / "2.json", status=1)

    def few(other):
        for row in other["rows"]:
            row["rates"] = row["rates"][:2]

    def twice(other):
        other["rows"][1]["name"] = NAMES[2]

    def broken(other):
        other["rows"][1]["rates"][4] = float("nan")

    def other_baseline(other):
        base = np.array(other["rows"][1]["rates"])
        for row in other["rows"][:2]:
            row["ratio"] = float(np.median(np.array(row["rates"]) / base))
            row["ratio_iqr"] = 0.1
        other["rows"][1] |= {"ratio": 1.0, "ratio_iqr": 0.0}

    assert "2.json has 2 rounds of 'none, threads 1'" in refused(few)
    assert "2.json has 2 rows of the name 'none, threads 2'" in refused(twice)
    assert "the rates of 'scae, threads 1' in" in refused(broken)
    assert "is the baseline in some of the files and not in others" in refused(other_baseline)
    assert content == json.loads(one.read_text())


@pytest.mark.parametrize("content", ["{}", "[1]", '{"rows": []}', '{"rows": [{"name": "none"}]}'])
def test_what_is_no_result(tmp_path, content):
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0)
    (tmp_path / "2.json").write_text(content)
    told = run("benchmark", "--compare", one, tmp_path / "2.json", status=1)
    assert "2.json is no result of a benchmark with its single rounds" in told


def test_a_file_that_is_no_json_is_named(tmp_path):
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0)
    (tmp_path / "2.json").write_text('{"rows": [')
    told = run("benchmark", "--compare", one, tmp_path / "2.json", status=1)
    assert "2.json is not a file of JSON (" in told


def test_an_odd_number_of_files(tmp_path):
    one = write(tmp_path / "1.json", [1000, 950, 1800, 1700], 0)
    assert "must be pairs" in run("benchmark", "--compare", one, one, one, status=2)
