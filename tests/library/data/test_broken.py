"""The quick look at image files, and DALI's messages turned into errors for the user."""

import os

import numpy as np
import pytest
from PIL import Image

from scae_dali.data import broken
from scae_dali.data.broken import concerns_images, explain, fault, faults
from scae_dali.data.index import ImageIndex

DECODE = """Critical error in pipeline:
Error in CPU operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "/home/somebody/pipeline.py", line 48, in define
    images = fn.decoders.image(encoded)

encountered:

{}
Current pipeline object is no longer valid."""


def encoded(tmp_path, **settings) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    path = tmp_path / "encoded"
    Image.fromarray(noise).save(path, **settings)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def jpeg(tmp_path) -> bytes:
    return encoded(tmp_path, format="JPEG")


def fault_of(tmp_path, data: bytes) -> str | None:
    (tmp_path / "file").write_bytes(data)
    return fault(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "JPEG"},
        {"format": "JPEG", "progressive": True},
        {"format": "JPEG", "exif": b"Exif\0\0" + b"\xff\xd9\xff\xda" * 9},
        {"format": "PNG"},
        {"format": "WEBP"},
        {"format": "BMP"},
        {"format": "TIFF"},
        {"format": "PPM"},
    ],
    ids=lambda settings: " ".join(settings).replace("format", settings["format"]),
)
def test_sound_files_pass(tmp_path, settings):
    assert fault_of(tmp_path, encoded(tmp_path, **settings)) is None


def test_what_is_appended_or_filled_in_does_no_harm(tmp_path, jpeg):
    assert fault_of(tmp_path, jpeg + b"x" * 100_000) is None
    assert fault_of(tmp_path, jpeg[:2] + b"\xff\xff" + jpeg[2:]) is None


def test_every_fault_has_its_name(tmp_path, jpeg):
    png, webp = encoded(tmp_path, format="PNG"), encoded(tmp_path, format="WEBP")
    frame, scan = jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xda")
    thumbnail = encoded(tmp_path, format="JPEG", exif=b"Exif\0\0\xff\xd8\xff\xd9")
    cases = {
        b"": "is empty",
        b"GIF89a": "is no image (it begins with b'GIF8')",
        jpeg[:2]: "is cut off (a JPEG that ends in its header)",
        jpeg[: scan - 3]: "is cut off (a JPEG that ends in its header)",
        jpeg[: len(jpeg) // 2]: "is cut off (a JPEG without an end marker)",
        jpeg[:-2]: "is cut off (a JPEG without an end marker)",
        thumbnail[:-2]: "is cut off (a JPEG without an end marker)",
        jpeg[:scan] + b"junk" + jpeg[scan:]: "has a damaged header",
        jpeg[:2] + b"\xff\xd9" + jpeg[2:]: "has a damaged header",
        jpeg[:2] + jpeg[scan:]: "has a damaged header (a JPEG without a frame)",
        jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :]: (
            "has a damaged header (a JPEG of no size)"
        ),
        png[: len(png) // 2]: "is cut off (a PNG without an end chunk)",
        webp[:-1]: "is cut off (a WebP shorter than it says)",
    }
    assert {data: fault_of(tmp_path, data) for data in cases} == cases
    assert fault(str(tmp_path / "gone")) == "cannot be read (No such file or directory)"
    assert fault(str(tmp_path)) == "cannot be read (Is a directory)"


@pytest.fixture
def index(tmp_path, jpeg) -> ImageIndex:
    """2500 links to one sound file, of which three lead nowhere or to an empty file."""
    (tmp_path / "sound.jpg").write_bytes(jpeg)
    (tmp_path / "empty.jpg").touch()
    wrong = {7: "empty.jpg", 1500: "gone.jpg", 2499: "empty.jpg"}
    names = [f"{i:04d}.jpg" for i in range(2500)]
    for i, name in enumerate(names):
        os.symlink(wrong.get(i, "sound.jpg"), tmp_path / name)
    return ImageIndex.from_arrays(names, np.zeros(2500, int), tmp_path)


def test_faults_are_found_in_order_and_within_a_budget(index):
    looked: list[int] = []
    found = list(faults(index, progress=looked.append))
    missing = "cannot be read (No such file or directory)"
    assert found == [("0007.jpg", "is empty"), ("1500.jpg", missing), ("2499.jpg", "is empty")]
    assert sum(looked) == 2500
    assert list(faults(index, seconds=0)) == found[:1]


def test_the_file_that_dali_names_leads_and_no_other_is_looked_at(index, monkeypatch):
    monkeypatch.setattr(broken, "faults", lambda *arguments, **keywords: pytest.fail("looked"))
    root = index.root
    said = explain(DECODE.format("Failed to decode sample #3 : 0010.jpg"), index)
    assert said.splitlines() == [
        f"'{root}/0010.jpg' does not decode.",
        "Mend or remove it, or leave it out with exclude= (train.py: --data.exclude); "
        "`scae-dali check-images --decode` finds every such file and writes the list.",
        "DALI in fn.decoders.image: Failed to decode sample #3 : 0010.jpg",
    ]
    said = explain(DECODE.format(f"File mapping failed: {root}/0007.jpg"), index)
    assert said.startswith(f"'{root}/0007.jpg' is empty.\n")
    assert "`scae-dali check-images` finds every" in said


def test_without_a_name_the_files_are_looked_at(index):
    said = explain(DECODE.format("nvImageCodec failure: '#3'"), index)
    missing = "cannot be read (No such file or directory)"
    assert said.startswith(
        f"'{index.root}/0007.jpg' is empty; '{index.root}/1500.jpg' {missing}; "
        f"'{index.root}/2499.jpg' is empty.\nMend or remove them"
    )
    assert said.endswith("\nDALI in fn.decoders.image: nvImageCodec failure: '#3'")
    for name in ("0008", "0009"):
        os.remove(os.path.join(index.root, f"{name}.jpg"))
    assert f"'{index.root}/0009.jpg' {missing}; and 2 more.\n" in explain(DECODE, index)


def test_where_a_look_finds_nothing_it_says_so(index):
    sound = index.subset(np.arange(100, 200))
    said = explain(DECODE.format("nvImageCodec failure: '#3'"), sound)
    assert said.startswith(
        f"A file in '{index.root}' cannot be read or decoded; a quick look found none.\n"
    )
    assert "`scae-dali check-images --decode` finds every such file" in said


@pytest.mark.parametrize(
    ("message", "concerned"),
    [
        (DECODE.format("Failed to decode sample #3 : 0010.jpg"), True),
        (DECODE.replace("decoders.image", "peek_image_shape"), True),
        (DECODE.replace("decoders.image", "readers.file"), True),
        (DECODE.replace("decoders.image", "python_function"), False),
        (DECODE.format("CUDA runtime API error cudaErrorMemoryAllocation (2)"), False),
        (DECODE.format("Failed to decode sample #0 : CUDA/memory/1.jpg"), True),
        ("an error of somebody else", False),
    ],
)
def test_only_reading_and_decoding_concern_images(message, concerned):
    assert concerns_images(message) is concerned
