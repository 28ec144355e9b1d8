"""Count how often the peak of a saliency map lies on the object (the pointing game).

    python tools/pointing_game.py --data demo/data --cache demo/run/saliency.lmdb

A hit is a map whose peak lies in the object's box (Zhang et al., "Top-down neural attention by
excitation backprop", IJCV 2018). `objects.json` beside train/ names the boxes, as
tools/make_demo_data.py writes them. The rate of random peaks, which is the boxes' mean area, is
printed beside the rate of hits.
"""

import json
import sys
from pathlib import Path

import numpy as np

from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.data.index import DatasetError, ImageIndex
from tools.common.about import write_json
from tools.common.options import add_data, parser_of


def pointing_game(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """maps: uint8 [N, h, w] over the full frame. boxes: float [N, 4], (y, x, h, w) as shares of it.
    Returns bool [N]: the centre of the map's strongest cell lies in the box."""
    n, h, w = maps.shape
    peak = maps.reshape(n, -1).argmax(1)
    y, x = (peak // w + 0.5) / h, (peak % w + 0.5) / w
    inside_y = (boxes[:, 0] <= y) & (y <= boxes[:, 0] + boxes[:, 2])
    inside_x = (boxes[:, 1] <= x) & (x <= boxes[:, 1] + boxes[:, 3])
    return inside_y & inside_x


def play(data: Path, cache_path: Path) -> dict[str, float]:
    """The figures for the training images of `data`."""
    index = ImageIndex(data / "train")
    known = json.loads((data / "objects.json").read_text())
    if missing := [name for name in index.files if f"train/{name}" not in known]:
        raise DatasetError(
            f"objects.json in {str(data)!r} must have the box of every training image, it has none "
            f"of 'train/{missing[0]}'; tools/make_demo_data.py writes it"
        )
    boxes = np.array([known[f"train/{name}"] for name in index.files])
    maps, found = SaliencyCache(cache_path, index=index).read(np.arange(len(index)))
    usable = found & (maps.max((1, 2)) > maps.min((1, 2)))
    hits = pointing_game(maps, boxes) & usable
    area = boxes[:, 2] * boxes[:, 3]
    return {
        "images": len(index),
        "usable_maps": float(usable.mean()),
        "hit_rate": float(hits[usable].mean()) if usable.any() else 0.0,
        "chance": float(area.mean()),
    }


def main() -> None:
    parser = parser_of(__doc__)
    add_data(
        parser,
        type=Path,
        required=True,
        help="folder that holds train/ and objects.json, as make_demo_data.py writes them",
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder of the saliency cache of these images"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as JSON")
    arguments = parser.parse_args()
    try:
        figures = play(arguments.data, arguments.cache)
    except (CacheError, DatasetError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"pointing game: {figures['hit_rate']:.1%} of {figures['usable_maps']:.1%} usable maps hit "
        f"(chance {figures['chance']:.1%})"
    )
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
