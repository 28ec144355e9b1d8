"""Which files a pattern names."""

import os
from pathlib import Path

import pytest

from scae_dali.data.patterns import expand
from scae_dali.data.scan import DatasetError


@pytest.fixture
def root(tmp_path):
    names = ["a-8.tar", "a-9.tar", "a-10.tar", "b-08.tar", "b-09.tar", "b-10.tar", "b-9.tar"]
    names.append("x[1].tar")
    for name in [*names, ".a-1.tar.index.npz", "d/a-8.tar"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-8.tar", ["a-8.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("b-{08..10}.tar", ["b-08.tar", "b-09.tar", "b-10.tar"]),
        ("b-{10..08}.tar", ["b-10.tar", "b-09.tar", "b-08.tar"]),
        ("{b-09,a-9}.tar", ["b-09.tar", "a-9.tar"]),
        ("{b,a}-{1*,9}.tar", ["b-10.tar", "b-9.tar", "a-10.tar", "a-9.tar"]),
        ("a-?.tar", ["a-8.tar", "a-9.tar"]),
        ("*-[91]*", ["a-10.tar", "a-9.tar", "b-10.tar", "b-9.tar"]),
        ("*[]]*", ["x[1].tar"]),
        ("x[1].tar", ["x[1].tar"]),
        ("./d/*", ["d/a-8.tar"]),
        (["a-9.tar", "a-8.tar"], ["a-9.tar", "a-8.tar"]),
        (Path("b-{09..10}.tar"), ["b-09.tar", "b-10.tar"]),
        ((Path("d") / "a-8.tar", "a-?.tar"), ["d/a-8.tar", "a-8.tar", "a-9.tar"]),
        ((name for name in ["a-9.tar"]), ["a-9.tar"]),
    ],
)
def test_braces_count_and_choose_and_globs_match(root, pattern, names):
    assert expand(pattern, root) == [str(root / name) for name in names]


def test_paths_are_relative_to_the_root_if_there_is_one(root, monkeypatch):
    assert expand(str(root / "a-{8..9}.tar"), "/elsewhere") == expand("a-{8..9}.tar", root)
    monkeypatch.chdir(root)
    assert expand("a-{8..9}.tar") == ["a-8.tar", "a-9.tar"]
    odd = root / "x[1] *"
    odd.mkdir()
    (odd / "1.tar").touch()
    assert expand("*", odd) == [os.path.join(odd, "1.tar")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "a-{8..11}.tar",
            r"'.*/a-11.tar' \(of the pattern 'a-\{8..11\}.tar'\) does not exist; give names that "
            r"do, relative to root=",
        ),
        ("c-*.tar", r"no file matches '.*/c-\*.tar'; give the archives' names"),
        ("d", "the archive '.*/d' is a folder; give names"),
        ("a-{8}.tar", r"'.*/a-\{8\}.tar' does not exist"),
        ("a-{8,9,8}.tar", r"the pattern 'a-\{8,9,8\}.tar' names '.*/a-8.tar' twice; name it once"),
        (["a-8.tar", "./a-8.tar"], "names '.*/a-8.tar' twice"),
        ([], "no archive is named; give a pattern"),
        (None, "must be named by a pattern or a list of patterns, got None; give one such as"),
        (["a-8.tar", 9], r"list of patterns, got \['a-8.tar', 9\]"),
        (b"a-8.tar", "list of patterns, got b'a-8.tar'"),
    ],
)
def test_what_is_not_there_is_named(root, pattern, message):
    with pytest.raises(DatasetError, match=message):
        expand(pattern, root)
