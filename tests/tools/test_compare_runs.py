"""The table of finished runs: grouped by settings, over seeds."""

import json

import pytest

from tools import compare_runs


def write_run(out, method, seed, top1, *, prob=0.5, epochs=2, done=2):
    out.mkdir()
    config = {"method": method, "seed": seed, "out": str(out), "epochs": epochs, "model": "m"}
    config["random_erasing"] = {"prob": prob}
    (out / "config.json").write_text(json.dumps(config))
    rows = [
        {"epoch": e, "val_top1": top1 + e, "best_top1": top1 + e, "median10_top1": top1 + e / 2,
         "val_top5": 80.0, "val_few": 5.0, "val_ece": 10.0}
        for e in range(done)
    ]  # fmt: skip
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_seeds_make_a_row_and_settings_of_other_methods_do_not_tell_runs_apart(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a", "none", 0, 36.0),
        write_run(tmp_path / "b", "none", 1, 38.0, prob=0.9),
        write_run(tmp_path / "c", "random_erasing", 0, 37.0),
        write_run(tmp_path / "d", "random_erasing", 0, 35.0, prob=0.37),
    ]
    out = tmp_path / "table.json"
    compare_runs.main([*map(str, runs), "--json", str(out)])
    table = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(table) == [
        "none",
        "random_erasing, random_erasing.prob 0.5",
        "random_erasing, random_erasing.prob 0.37",
    ]
    assert table["none"]["seeds"] == [0, 1]
    last = table["none"]["figures"]["last"]
    assert (last["mean"], last["std"]) == (38.0, pytest.approx(2**0.5))
    assert table["none"]["figures"]["median10"]["mean"] == 37.5
    assert "many" not in table["none"]["figures"]
    assert "38.00 ± 1.41" in capsys.readouterr().out


def test_runs_that_have_not_ended_are_refused(tmp_path):
    run = write_run(tmp_path / "a", "none", 0, 36.0, epochs=5)
    with pytest.raises(SystemExit, match=r"has 2 of 5 epochs: let it end \(--resume\) first"):
        compare_runs.main([str(run)])
    with pytest.raises(SystemExit, match="must be the folder of a run with a finished epoch"):
        compare_runs.main([str(tmp_path)])
