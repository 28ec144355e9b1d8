"""Draw a small long-tailed data set on which saliency-guided erasing can be tried within minutes.

Every image holds one object on clutter. A class is a shape in a colour, solid or striped; classes
share all three, so that none alone tells the class, and the clutter uses the same colours.
`objects.json` says where the objects lie, so that a saliency map can be judged against the truth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scae_dali.commands.program import run_program
from tools.common.options import parser_of

SHAPES = ("disc", "triangle", "cross", "ring", "bars")
COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 185, 70),
    "blue": (50, 90, 235),
    "yellow": (240, 215, 45),
    "violet": (190, 70, 215),
}
STRIPE = (250, 250, 250)
MAX_CLASSES = len(SHAPES) * len(COLOURS)
OBJECT_SIDE = (0.28, 0.36)  # of the image's shorter side
ROTATED_EVERY = 20  # one image in so many is stored rotated, with an EXIF orientation
# EXIF orientation -> how the upright image is turned for storage
STORED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
DRAWING_VERSION = 1  # raise it when the same parameters give other pixels


def class_design(k: int) -> tuple[str, str, str]:
    """Class k's shape, colour and pattern: no other class has the shape in that colour."""
    shape, turn = k % len(SHAPES), k // len(SHAPES)
    colour = list(COLOURS)[(shape + turn) % len(COLOURS)]
    return SHAPES[shape], colour, ("solid", "striped")[turn % 2]


def train_counts(classes: int, train_max: int, imbalance: float) -> list[int]:
    """Long-tailed counts, n_k = train_max · imbalance^(-k/(K-1)), at least 1."""
    return [
        max(1, round(train_max * imbalance ** (-k / max(1, classes - 1)))) for k in range(classes)
    ]


def object_mask(shape: str, side: int) -> Image.Image:
    """The shape's coverage, L mode, side x side; it touches all four borders, and mirrors."""
    scale = 4  # drawn larger, then reduced: smooth edges
    n = side * scale
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    third = n / 3
    if shape == "disc":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "triangle":
        draw.polygon(((n / 2, 0), (n - 1, n - 1), (0, n - 1)), fill=255)
    elif shape == "cross":
        draw.rectangle((third, 0, 2 * third, n - 1), fill=255)
        draw.rectangle((0, third, n - 1, 2 * third), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        draw.ellipse((0.28 * n, 0.28 * n, 0.72 * n, 0.72 * n), fill=0)
    else:
        draw.rectangle((0, 0, n - 1, 0.36 * n), fill=255)
        draw.rectangle((0, 0.64 * n, n - 1, n - 1), fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def clutter(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A background that says nothing of the class: gradient, textures, lines and blobs."""
    ramp_y, ramp_x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (ramp_y - 0.5) * math.sin(angle) + (ramp_x - 0.5) * math.cos(angle) + 0.5
    first, second = rng.uniform(60, 190, (2, 3))
    pixels = first + (second - first) * ramp[..., None]
    for cells, strength in ((6, 30.0), (20, 18.0)):
        coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        texture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels += strength * np.asarray(texture)[..., None]
    pixels += rng.normal(0, 8, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(image)
    side = min(height, width)
    for _ in range(rng.integers(3, 7)):
        colour = jittered(rng, str(rng.choice(list(COLOURS))))
        ends = rng.uniform(0, 1, 4) * (width, height, width, height)
        draw.line(tuple(ends.tolist()), fill=colour, width=int(rng.integers(1, 4)))
    for _ in range(rng.integers(3, 7)):
        colour = jittered(rng, str(rng.choice(list(COLOURS))))
        x, y = rng.uniform(0, 1, 2) * (width, height)
        ry, rx = rng.uniform(0.02, 0.06, 2) * side
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
    return image


def jittered(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    """The colour, a little off in each channel."""
    r, g, b = (np.array(COLOURS[colour]) + rng.integers(-20, 21, 3)).clip(0, 255).tolist()
    return r, g, b


def draw_sample(
    rng: np.random.Generator, design: tuple[str, str, str], size_range: tuple[int, int]
) -> tuple[Image.Image, list[float]]:
    """An upright RGB image and its object's box (y, x, h, w), fractions of that image."""
    shape, colour, pattern = design
    height, width = rng.integers(size_range[0], size_range[1] + 1, 2).tolist()
    image = clutter(rng, height, width)
    side = round(rng.uniform(*OBJECT_SIDE) * min(height, width))
    y = int(rng.integers(0, height - side + 1))
    x = int(rng.integers(0, width - side + 1))
    paint = Image.new("RGB", (side, side), jittered(rng, colour))
    if pattern == "striped":
        for stripe in (1, 3, 5):
            left, right = round(stripe * side / 7), round((stripe + 1) * side / 7)
            paint.paste(STRIPE, (left, 0, right, side))
    image.paste(paint, (x, y), object_mask(shape, side))
    box = [y / height, x / width, side / height, side / width]
    return image, [round(v, 6) for v in box]


def make(
    out: Path,
    *,
    classes: int,
    train_max: int,
    imbalance: float,
    val_per_class: int,
    seed: int,
    size_range: tuple[int, int],
    report: Callable[[str], None] = print,
) -> None:
    """Write the data set to `out`; the same parameters and Pillow give the same bytes.

    Raises ValueError for parameters out of range, FileExistsError where `out` holds something else.
    """
    if not 2 <= classes <= MAX_CLASSES:
        raise ValueError(f"--classes must be 2 … {MAX_CLASSES}, got {classes}")
    if train_max < 1 or val_per_class < 1 or seed < 0:
        raise ValueError(
            f"--train-max and --val-per-class must be at least 1 and --seed at least 0, "
            f"got {train_max}, {val_per_class} and {seed}"
        )
    if not 1 <= imbalance < math.inf:
        raise ValueError(f"--imbalance must be a finite number of at least 1, got {imbalance}")
    if not 32 <= size_range[0] <= size_range[1]:
        raise ValueError(f"--size-range must be 32 <= LOW <= HIGH pixels, got {size_range}")
    meta = {
        "drawing_version": DRAWING_VERSION,
        "classes": classes,
        "train_max": train_max,
        "imbalance": imbalance,
        "val_per_class": val_per_class,
        "seed": seed,
        "size_range": list(size_range),
    }
    counts = train_counts(classes, train_max, imbalance)
    designs = [class_design(k) for k in range(classes)]
    names = [f"{k:02d}_{c}_{s}" for k, (s, c, _) in enumerate(designs)]
    if already_there(out, meta):
        report(f"{out}: already there")
    else:
        objects = {}
        for part, (split, split_counts) in enumerate(
            (("train", counts), ("val", [val_per_class] * classes))
        ):
            for k, (name, count) in enumerate(zip(names, split_counts, strict=True)):
                folder = out / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    # A stream per image: it stays the same whatever the other counts are.
                    rng = np.random.default_rng((seed, part, k, i))
                    image, box = draw_sample(rng, designs[k], size_range)
                    save(image, folder / f"{i:05d}.jpg", turn=i % ROTATED_EVERY == 3, number=i + k)
                    objects[f"{split}/{name}/{i:05d}.jpg"] = box
        lines = ",\n".join(f"{json.dumps(path)}: {json.dumps(objects[path])}" for path in objects)
        (out / "objects.json").write_text(f"{{\n{lines}\n}}\n")
        (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")  # last: all is there
    report(f"{'class':>18} train  f_k   val")
    for name, count in zip(names, counts, strict=True):
        report(f"{name:>18} {count:5d} {count / max(counts):5.3f} {val_per_class:4d}")
    report(f"{'all':>18} {sum(counts):5d}       {val_per_class * classes:4d}")


def already_there(out: Path, meta: dict) -> bool:
    """Whether `out` holds this very data set; FileExistsError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        same = json.loads((out / "meta.json").read_text()) == meta
        complete = same and all(
            (out / path).is_file() for path in json.loads((out / "objects.json").read_text())
        )
    except (OSError, ValueError):
        complete = False
    if not complete:
        raise FileExistsError(
            f"{out} exists and is not the complete data set of these parameters; "
            f"give another folder, or remove it first"
        )
    return True


def save(image: Image.Image, path: Path, *, turn: bool, number: int) -> None:
    """Write a JPEG; with `turn`, rotated, and with the EXIF orientation that makes it upright."""
    exif = Image.Exif()
    if turn:
        exif[0x0112] = orientation = list(STORED)[number % len(STORED)]
        image = image.transpose(STORED[orientation])
    image.save(path, quality=88, exif=exif)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new folder for train/, val/ and objects.json"
    )
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)  # the older --out
    parser.add_argument(
        "--classes", type=int, default=10, help=f"number of classes, from 2 to {MAX_CLASSES}"
    )
    parser.add_argument(
        "--train-max", type=int, default=200, help="number of training images of the largest class"
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=20.0,
        help="number of training images of the largest class, divided by that of the smallest",
    )
    parser.add_argument(
        "--val-per-class", type=int, default=20, help="number of validation images of each class"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    parser.add_argument(
        "--size-range",
        type=int,
        nargs=2,
        default=(96, 160),
        metavar=("LOW", "HIGH"),
        help="smallest and largest side of an image in pixels",
    )
    arguments = vars(parser.parse_args(argv))
    folder = arguments.pop("folder")
    arguments["out"] = arguments["out"] or folder
    if arguments["out"] is None:
        parser.error("--out must name the folder to write, got none")
    arguments["size_range"] = tuple(arguments["size_range"])
    try:
        make(**arguments)
    except (ValueError, OSError) as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
