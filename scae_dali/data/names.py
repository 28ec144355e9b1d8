"""Finds a sample's place in the index by what a DALI reader calls it (`source_info`).

A member of a tar goes by its own name, or by `archive.tar/member` where several archives hold
members of one name. A sample that is read from two members is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from scae_dali.data.scan import DatasetError, Int64

__all__ = ["Names"]

_WEBDATASET = re.compile(r"(.+?):(\d+):(.+)", re.DOTALL)  # archive.tar:OFFSET:member


class Names:
    """Resolves the names of one reader, and remembers which member of an archive each sample was.

    files: str [N], those of the index. root: the folder that they are relative to, "" for none.
    find: names -> places in `files`, int64, -1 where there is none. place: path of an archive,
    offset in it -> the place of the member there, -1 where there is none; None without archives.
    """

    def __init__(
        self,
        files: Sequence[str],
        root: str,
        find: Callable[[Sequence[str]], Int64],
        place: Callable[[str, int], int] | None = None,
    ) -> None:
        self._files, self._root, self._find, self._place = files, root, find, place
        self._prefixes: dict[str, str] = {}  # archive -> what `files` has before its members
        self._folders: set[str] | None = None  # all folders in `files`; None: not collected yet
        self._numbers: dict[str, int] = {}  # archive -> its number, from 1
        self._members: Int64 | None = None  # [N, 2], number of the archive and offset; 0: unseen

    def ids(self, names: Sequence[str]) -> Int64:
        """Places in the index, int64 [B], of names as `ImageIndex.ids_of` has them.

        Raises DatasetError for an unknown name, and for a sample that is read from two members.
        """
        ids = self._find(names)
        if (unknown := np.flatnonzero(ids < 0)).size:
            relative = [self._relative(names[b]) for b in unknown.tolist()]
            members = [_WEBDATASET.fullmatch(name) for name in relative]
            short = [
                name if member is None else self._prefix(member[1]) + _member(member)
                for name, member in zip(relative, members, strict=True)
            ]
            found = self._find(short)
            if (left := np.flatnonzero(found < 0)).size:  # not listed behind their archive
                alone = [_member(m) if (m := members[k]) else short[k] for k in left.tolist()]
                found[left] = self._find(alone)
                if (dotted := left[found[left] < 0]).size:  # listed as `tar tf` prints them
                    where = dict(zip(left.tolist(), alone, strict=True))
                    found[dotted] = self._find([f"./{where[k]}" for k in dotted.tolist()])
            for k in np.flatnonzero(found < 0).tolist():
                if (whole := _WEBDATASET.fullmatch(names[unknown[k]])) is not None:
                    found[k] = self._there(whole)
            ids[unknown] = found
            inside = [(i, m) for i, m in zip(found.tolist(), members, strict=True) if m and i >= 0]
            if inside:
                self._watch(np.array([i for i, _ in inside]), [member for _, member in inside])
        if (unknown := np.flatnonzero(ids < 0)).size:
            name = names[unknown[0]]
            raise DatasetError(
                f"no sample is named {name[:200]!r}; names here look like {self._files[0]!r}, with "
                f"or without root={self._root!r} in front"
            )
        return ids

    def _there(self, member: re.Match[str]) -> int:
        """The place of the sample that lies where DALI says, -1 where there is none.

        DALI leaves out what is before the last ../, and a leading /. Letters are ? in a tar of the
        PAX format. If another name lies there, the archive has changed since it was indexed.
        """
        i = -1 if self._place is None else self._place(member[1], int(member[2]))
        return i if i >= 0 and _letters(self._files[i]) == _letters(member[3]) else -1

    def _relative(self, name: str) -> str:
        prefix = os.path.join(self._root, "")
        name = name[len(prefix) :] if self._root and name.startswith(prefix) else name
        return name.removeprefix("./")  # readers name files of their file_root so

    def _prefix(self, archive: str) -> str:
        """What `files` has before the members of an archive: the longest that is known, or ""."""
        if self._folders is None:
            self._folders = set()
            for folder in {name.rpartition("/")[0] for name in self._files}:
                parts = folder.split("/")
                self._folders.update("/".join(parts[:k]) for k in range(1, len(parts) + 1))
        if archive not in self._prefixes:
            parts = archive.split("/")
            forms = ("/".join(parts[k:]) for k in range(len(parts)))
            known = next((form for form in forms if form in self._folders), None)
            self._prefixes[archive] = "" if known is None else f"{known}/"
        return self._prefixes[archive]

    def _watch(self, ids: Int64, members: Sequence[re.Match[str]]) -> None:
        """Raise DatasetError where one of these samples comes from another member than before."""
        if self._members is None:
            self._members = np.zeros((len(self._files), 2), np.int64)
        number = self._numbers
        for member in members:
            number.setdefault(member[1], len(number) + 1)
        here = np.array([(number[member[1]], int(member[2])) for member in members])
        first = np.unique(ids, return_index=True)[1]
        new = first[self._members[ids[first], 0] == 0]
        self._members[ids[new]] = here[new]
        before = self._members[ids]
        if (moved := np.flatnonzero((before != here).any(axis=1))).size:
            at, (first, offset) = members[moved[0]], before[moved[0]].tolist()
            archive = next(name for name, given in number.items() if given == first)
            raise DatasetError(
                f"sample {self._files[ids[moved[0]]]!r} comes from two places, "
                f"{f'{archive}:{offset}:{at[3]}'!r} and {at[0]!r}: one label would serve both; "
                f"list members as archive/member, such as {_apart(at[1], archive)}/{_member(at)}"
            )


def _member(match: re.Match[str]) -> str:
    return match[3].removeprefix("./")  # `tar cf x.tar .` names members so


def _letters(name: str) -> bytes:
    """What any format of tar keeps of the last part of a name."""
    return name.rpartition("/")[2].encode("ascii", "ignore").replace(b"?", b"")


def _apart(archive: str, other: str) -> str:
    """The shortest end of an archive's path that the other one does not have."""
    parts, others = archive.split("/"), other.split("/")
    same = 0
    while parts[-1 - same :] == others[-1 - same :] and same + 1 < len(parts):
        same += 1
    return "/".join(parts[-1 - same :])
