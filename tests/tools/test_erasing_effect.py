"""What guidance takes away: rectangles of one size whose place alone depends on λ."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_cache, write_pngs
from PIL import Image

from pipelines.data import DataConfig
from pipelines.recipe import Config, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.training.networks import make_network
from tools import erasing_effect as effect

SIZE = 24


@pytest.fixture
def run(tmp_path):
    """A network that was never trained, as a finished run: 40 images of 2 classes, random maps."""
    write_pngs(tmp_path / "data" / "train", {"a": 25, "b": 15}, (SIZE, SIZE))
    write_pngs(tmp_path / "data" / "val", {"a": 1, "b": 1}, (SIZE, SIZE), seed=1)
    out = tmp_path / "run"
    out.mkdir()
    config = Config(
        data=DataConfig(root=str(tmp_path / "data")),
        out=str(out),
        model="cifar_resnet20",
        image=ImageConfig(size=SIZE, val_resize=SIZE),
        batch_size=16,
        threads=2,
        device="cpu",
    )
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    torch.manual_seed(0)
    net = make_network("cifar_resnet20", 2)
    torch.nn.init.normal_(net.get_submodule("fc").weight, std=1e-3)  # or all are certain
    torch.save(net.state_dict(), out / "weights.pt")
    fill_cache(out / "saliency.lmdb", ImageIndex(tmp_path / "data" / "train")).close()
    return out


def test_rows(run, capsys):
    out = run / "effect.json"
    effect.main([str(run), "--lam=-8,0,8", "--json", str(out)])
    found = json.loads(out.read_text())
    rows = {row["lam"]: row for row in found["rows"]}
    assert [*rows] == [None, -8, 0, 8]
    assert rows[-8]["saliency"] < rows[0]["saliency"] < rows[8]["saliency"]
    assert (rows[None]["saliency"], rows[None]["fall"]) == (None, 0)
    for row in rows.values():
        assert row["images"] == 40
        assert row["fall"] == pytest.approx(rows[None]["probability"] - row["probability"])
    assert len({row["probability"] for row in rows.values()}) == 4
    assert str(run) not in out.read_text()
    assert "λ = -8" in capsys.readouterr().out
    effect.main([str(run), "--lam=0", "--images", "7", "--json", str(out)])
    assert json.loads(out.read_text())["rows"][0]["images"] == 7


def test_a_row_of_no_erasing_is_what_the_network_says(run, tmp_path):
    """The images are whole, normalised, and those of their labels."""
    args = effect.parse([str(run), "--lam=0"])
    whole = effect.measure(args)[0]
    net = make_network("cifar_resnet20", 2).eval()
    net.load_state_dict(torch.load(run / "weights.pt"))
    index = ImageIndex(tmp_path / "data" / "train")
    image = ImageConfig(size=SIZE, val_resize=SIZE)
    pixels = np.stack([np.asarray(Image.open(Path(index.root, name))) for name in index.files])
    inputs = (pixels - np.array(image.mean)) / np.array(image.std)
    with torch.no_grad():
        p = net(torch.from_numpy(inputs).float().permute(0, 3, 1, 2)).softmax(1).numpy()
    assert whole["probability"] == pytest.approx(p[np.arange(40), index.labels].mean(), abs=1e-4)
    assert whole["top1"] == pytest.approx(100 * (p.argmax(1) == index.labels).mean())


def test_lambda_moves_rectangles_and_does_not_resize_them(run):
    config, _, data, cache = effect.open_run(effect.parse([str(run)]))
    ids = np.arange(40)
    boxes = {lam: effect.planner(data.train, cache, config, lam, 3)(ids) for lam in (0, 8)}
    assert (boxes[0][:, 2:] == boxes[8][:, 2:]).all()
    assert (boxes[0][:, 2:].min(1) > 0).mean() > 0.9
    assert (boxes[0][:, :2] != boxes[8][:, :2]).any(1).mean() > 0.5
    assert (boxes[8][:, :2] >= 0).all()
    assert (boxes[8][:, :2] + boxes[8][:, 2:] <= SIZE).all()


def test_contrast_and_fill():
    maps = np.zeros((3, 2, 2), np.uint8)
    maps[0] = 51
    maps[1, 0, 0] = 255
    boxes = np.array([[3, 4, 5, 4], [0, 0, 2, 2], [0, 0, 2, 2]])
    ratio = effect.contrast(maps, boxes, 8)
    # The outermost quarter of a cell is flat; a map of one cell in four has the mean 1/4.
    np.testing.assert_allclose(ratio, [1, 4, np.nan], rtol=1e-5)
    images = torch.ones(3, 3, 8, 8)
    filled = effect.erased(images, boxes)
    assert filled.sum((1, 2, 3)).tolist() == [3 * 44, 3 * 60, 3 * 60]
    assert filled[0, :, 3:8, 4:8].sum() == 0
    assert images.min() == 1


def test_what_is_no_finished_run_is_refused(run):
    (run / "weights.pt").unlink()
    with pytest.raises(SystemExit, match=r"run' must be the folder of a finished run of train\.py"):
        effect.main([str(run)])
    with pytest.raises(SystemExit):
        effect.main([str(run), "--lam=much"])
