"""What is found in a webdataset's tar, and what is wrong with it."""

import gzip
import io
import tarfile

import pytest
from packs import write_tar

from scae_dali.data.scan import DatasetError
from scae_dali.data.tars import scan_tar

JPEG = b"\xff\xd8 an image"


def members(*names, label=b"3"):
    return [(name, label if name.endswith(".cls") else JPEG + name.encode()) for name in names]


def add(path, *entries, format=tarfile.GNU_FORMAT):
    """Members behind those of a tar: (name, content), or (name, type, link)."""
    with tarfile.open(path, "a", format=format) as archive:
        for name, *what in entries:
            info = tarfile.TarInfo(name)
            if len(what[0]) == 1:  # types have one byte
                info.type, info.linkname = what[0], "".join(what[1:])
                archive.addfile(info)
            else:
                info.size = len(what[0])
                archive.addfile(info, io.BytesIO(what[0]))


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


def test_folders_are_passed_over(tmp_path):
    write_tar(tmp_path / "s.tar", members("a/1.jpg", "a/1.cls"))
    add(tmp_path / "s.tar", ("b.jpg", tarfile.DIRTYPE), ("c.cls", tarfile.DIRTYPE))
    assert scan_tar(str(tmp_path / "s.tar")).names == ["a/1.jpg"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hard_link_has_the_content_of_the_last_member_of_that_name_before_it(tmp_path, format):
    """A link to a link, to a hidden member, to a long name, and to a name that comes twice."""
    path, link = tmp_path / "s.tar", tarfile.LNKTYPE
    long = "d" * 90 + "/" + "e" * 90
    entries = [("./a.jpg", b"first"), ("./a.cls", b"04"), (f"{long}.png", b"a long one")]
    entries += [(f"{long}.cls", b"12"), ("LICENSE", link, "COPYING"), (".b", b"hidden")]
    entries += [("1.jpg", link, "a.jpg"), ("1.cls", link, "./a.cls"), ("2.jpg", link, "1.jpg")]
    entries += [("2.cls", b"17"), ("x/3.jpg", link, f"{long}.png"), ("x/3.cls", link, "2.cls")]
    entries += [("a.jpg.old", link, "a.jpg"), ("a.jpg.old", b"newer"), ("4.cls", b"05")]
    entries += [("4.jpg", link, "a.jpg.old"), ("5.jpg", link, ".b"), ("5.cls", link, "1.cls")]
    with tarfile.open(path, "w"):
        pass
    add(path, *entries, format=format)
    found = scan_tar(str(path))
    data = path.read_bytes()
    contents = [data[offset : offset + size] for offset, size in found.where.tolist()]
    assert list(zip(found.names, contents, found.labels.tolist(), strict=True)) == [
        ("a.jpg", b"first", 4),
        (f"{long}.png", b"a long one", 12),
        ("1.jpg", b"first", 4),
        ("2.jpg", b"first", 17),
        ("x/3.jpg", b"a long one", 17),
        ("4.jpg", b"newer", 5),
        ("5.jpg", b"hidden", 4),
    ]


def test_one_sample_under_one_name_twice_is_told_though_its_bytes_are_the_same(tmp_path):
    """GNU tar links a file that it is given twice to itself."""
    path, link = tmp_path / "s.tar", tarfile.LNKTYPE
    write_tar(path, members("1.jpg", "1.cls", "2.jpg", "2.cls"))
    add(path, ("1.jpg", link, "1.jpg"), ("1.cls", link, "1.cls"))
    with pytest.raises(DatasetError, match=r"two samples named '1.jpg', at bytes 512 and 512"):
        scan_tar(str(path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("7.jpg", tarfile.LNKTYPE, "8.jpg"), "'7.jpg' is a link to '8.jpg', which is no plain f"),
        (("7.cls", tarfile.LNKTYPE, "7.cls"), "'7.cls' is a link to '7.cls', .* --hard-deref"),
        (("7.jpg", tarfile.SYMTYPE, "1.jpg"), "'7.jpg' is a symbolic link to '1.jpg'; .* --deref"),
        (("./7.cls", tarfile.SYMTYPE, "/x/1.cls"), "'./7.cls' is a symbolic link to '/x/1.cls'; "),
        (("7.PNG", tarfile.CHRTYPE), "'7.PNG' is no file, but a member of the type b'3'; pack it"),
        (("7.cls", tarfile.FIFOTYPE), "'7.cls' is no file, but a member of the type b'6'"),
        (("7.jpg", b"M"), "'7.jpg' is no file, but a member of the type b'M'"),
        (("7.jpg", tarfile.GNUTYPE_SPARSE), "'7.jpg' is stored without the holes .*out --sparse"),
    ],
)
def test_images_and_labels_that_are_no_files_are_refused(sound, entry, message):
    add(sound, entry, ("more.txt", b"of another kind"))
    with pytest.raises(DatasetError, match=message):
        scan_tar(str(sound))


@pytest.mark.parametrize(
    "headers",
    [
        {"major": "1", "minor": "0", "realsize": "90000", "name": "9.jpeg"},
        {"size": "90000", "numblocks": "1", "map": "65536,10"},
    ],
)
def test_a_sparse_member_is_refused_only_in_a_sample(sound, headers):
    """As GNU tar writes them; its map of a member's parts comes first in the content."""
    for name in ("core.bin", "9.jpeg"):
        info = tarfile.TarInfo(name)
        more = {"name": name} if "name" in headers else {}
        given = (headers | more).items()
        info.pax_headers = {f"GNU.sparse.{key}": value for key, value in given}
        content = b"1\n65536\n10\n".ljust(512, b"\0") * ("major" in headers) + b"0123456789"
        info.size = len(content)
        with tarfile.open(sound, "a", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(info, io.BytesIO(content))
        if name == "core.bin":
            assert scan_tar(str(sound)).names == ["1.jpg", "2.jpg"]
    with pytest.raises(DatasetError, match=r"'9.jpeg' is stored without the holes of its file"):
        scan_tar(str(sound))
    if "major" in headers:
        sound.write_bytes(sound.read_bytes().replace(b"1\n65536\n", b"x\n65536\n"))
        with pytest.raises(DatasetError, match=r"s.tar' is no tar, or damaged at byte 4096 \("):
            scan_tar(str(sound))


def test_a_symbolic_link_that_may_be_to_a_folder_is_told(sound):
    add(sound, ("more", tarfile.SYMTYPE, "/data/more"), (".x", tarfile.SYMTYPE, "x"))
    with pytest.warns(RuntimeWarning, match=r"the symbolic link 'more', which is left out; if im"):
        assert scan_tar(str(sound)).names == ["1.jpg", "2.jpg"]


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
        (members("1.jpg", "1.cls", label=b"2_5"), r"as text, got b'2_5'"),
        (members("1.jpg", "1.cls", label="٣".encode()), r"as text, got b'\\xd9\\xa3'"),
        (members("1.jpg", "1.cls", label=b"- 3"), r"as text, got b'- 3'"),
        (members("1.jpg", "1.cls", label=b"9223372036854775808"), "as text, got b'922337203685477"),
        (members("1.jpg", "1.cls", label=b"7" * 5000), "as text, got b'7{40}'; pack it again"),
        (
            members("1.cls", "1.jpg", "./1.cls"),
            "several labels of '1.jpg', 2 members named '1.cls'; pack it again with one label a s",
        ),
    ],
)
def test_samples_that_are_incomplete_or_come_twice_are_named(tmp_path, content, message):
    write_tar(tmp_path / "s.tar", content)
    with pytest.raises(DatasetError, match=message):
        scan_tar(str(tmp_path / "s.tar"))


def test_labels_may_have_signs_and_blanks(tmp_path):
    for text, label in [(b"-4\n", -4), (b"\t+7", 7), (b"9223372036854775807", (1 << 63) - 1)]:
        write_tar(tmp_path / "s.tar", members("1.jpg", "1.cls", label=text))
        assert scan_tar(str(tmp_path / "s.tar")).labels.tolist() == [label]


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


def test_what_lies_behind_the_end_mark_is_told(sound, tmp_path):
    whole = sound.read_bytes()
    write_tar(tmp_path / "other.tar", members("8.png", "8.cls"))
    other = (tmp_path / "other.tar").read_bytes()
    for behind in (other, bytes(3 << 20) + other, b"\0\0?"):
        sound.write_bytes(whole + behind)
        at = len(whole + behind) - len(behind.lstrip(b"\0"))
        with pytest.raises(
            DatasetError, match=rf"more behind its end mark, from byte {at} on; if .*ignore-zeros"
        ):
            scan_tar(str(sound))
    lone = sound.read_bytes()[: 4 * 1024] + bytes(512) + other
    sound.write_bytes(lone)
    with pytest.raises(DatasetError, match="from byte 4608 on"):
        scan_tar(str(sound))
    sound.write_bytes(whole + bytes(3 << 20))
    assert scan_tar(str(sound)).names == ["1.jpg", "2.jpg"]


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
