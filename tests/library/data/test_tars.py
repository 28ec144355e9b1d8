"""What is found in a webdataset's tar, and what is wrong with it."""

import gzip
import tarfile

import pytest
from packs import write_tar

from scae_dali.data.scan import DatasetError
from scae_dali.data.tars import scan_tar

JPEG = b"\xff\xd8 an image"


def members(*names, label=b"3"):
    return [(name, label if name.endswith(".cls") else JPEG + name.encode()) for name in names]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_labels_and_where_they_lie(tmp_path, format):
    """Suffixes in any order and case, other members, names that only GNU and PAX hold."""
    long = "d" * 90 + "/" + "e" * 90
    names = ["./a/1.JPEG", "a/1.cls", "a/1.json", "b.x/2.seg.png", "b.x/2.cls", "b.x/2.png"]
    names += [f"{long}.cls", f"{long}.webp", "README.txt", ".hidden.jpg", "c/._3.jpg", "ü.jpg"]
    names += ["ü.cls"]
    if format == tarfile.USTAR_FORMAT:
        names = [name for name in names if name.isascii() and len(name) < 100]
    write_tar(tmp_path / "s.tar", members(*names, label=b" 17\n"), format)
    found = scan_tar(str(tmp_path / "s.tar"))
    wanted = ["a/1.JPEG", "b.x/2.png"]
    if format != tarfile.USTAR_FORMAT:
        wanted += [f"{long}.webp", "ü.jpg"]
    assert found.names == wanted
    assert found.labels.tolist() == [17] * len(wanted)
    data = (tmp_path / "s.tar").read_bytes()
    for name, (offset, size) in zip(found.names, found.where.tolist(), strict=True):
        assert data[offset : offset + size].removeprefix(JPEG).decode().removeprefix("./") == name


def test_folders_and_links_are_passed_over(tmp_path):
    write_tar(tmp_path / "s.tar", members("a/1.jpg", "a/1.cls"))
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("a/2.jpg")
            info.type, info.linkname = kind, "a/1.jpg"
            archive.addfile(info)
    assert scan_tar(str(tmp_path / "s.tar")).names == ["a/1.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (members("1.jpg", "2.jpg", "2.cls"), r"s.tar' has no label of '1.jpg'; add a member 1.cls"),
        (members("1.cls", "2.jpg", "1.jpg"), "no image of '1', whose suffixes are cls; pack it"),
        (members("1.5.jpg", "1.5.cls"), r"no image of '1', whose suffixes are 5.jpg, 5.cls; pack"),
        (members("1.jpg", "1.cls", "1.png"), r"has several images of '1' \(jpg, cls, png\); pack"),
        (members("1.jpg", "1.cls", "1.jpg"), r"has several images of '1' \(jpg, cls, jpg\); pack"),
        (
            members("a/1.jpg", "a/1.cls", "2.jpg", "2.cls", "./a/1.jpg", "a/1.cls"),
            "has two samples named 'a/1.jpg', at bytes 512 and 4608; pack it again with a name for",
        ),
        (
            members("1.jpg", "1.cls", label=b"n0144"),
            r"'1.cls' must be the number of a class as text, got b'n0144'; pack it again with num",
        ),
        (members("1.jpg", "1.cls", label=b""), "must be the number of a class as text, got b''"),
    ],
)
def test_samples_that_are_incomplete_or_come_twice_are_named(tmp_path, content, message):
    write_tar(tmp_path / "s.tar", content)
    with pytest.raises(DatasetError, match=message):
        scan_tar(str(tmp_path / "s.tar"))


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, members("1.jpg", "1.cls", "2.jpg", "2.cls"))
    return path


def test_an_empty_tar_has_no_samples(tmp_path):
    write_tar(tmp_path / "s.tar", [])
    (tmp_path / "none.tar").touch()
    for name in ("s.tar", "none.tar"):
        found = scan_tar(str(tmp_path / name))
        assert (found.names, found.labels.shape, found.where.shape) == ([], (0,), (0, 2))


@pytest.mark.parametrize("kept", [300, 512, 520, 1024 + 300, 1024 + 512, 2048 + 515])
def test_a_tar_that_is_cut_off_within_a_member_is_told(sound, kept):
    sound.write_bytes(sound.read_bytes()[:kept])
    with pytest.raises(DatasetError, match=r"s.tar' is (cut off|no tar, or damaged at)"):
        scan_tar(str(sound))


def test_a_tar_without_its_end_may_be_cut_off(sound):
    whole = scan_tar(str(sound))
    sound.write_bytes(sound.read_bytes()[: 4 * 1024])
    with pytest.warns(RuntimeWarning, match=r"s.tar' has no end mark, so it may be cut off"):
        assert scan_tar(str(sound)).names == whole.names
    sound.write_bytes(sound.read_bytes()[: 2 * 1024])
    with pytest.warns(RuntimeWarning, match="no end mark"):
        assert scan_tar(str(sound)).names == whole.names[:1]


def test_a_damaged_header_is_not_taken_for_the_end(sound):
    data = bytearray(sound.read_bytes())
    data[2 * 1024 + 100] ^= 255
    sound.write_bytes(data)
    with pytest.raises(DatasetError, match=r"s.tar' has a damaged header at byte 2048; copy it"):
        scan_tar(str(sound))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gzip.compress, "s.tar' is compressed by gzip, so that no sample can be read alone"),
        (lambda data: JPEG * 100, r"s.tar' is no tar, or damaged at byte 0 \("),
    ],
)
def test_what_is_no_plain_tar_is_told(sound, change, message):
    sound.write_bytes(change(sound.read_bytes()))
    with pytest.raises(DatasetError, match=message):
        scan_tar(str(sound))
