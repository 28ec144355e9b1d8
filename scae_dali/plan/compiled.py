"""Functions that Numba compiles. Their machine code is kept on disk where that is possible.

Numba lets every fault of its files on disk through to whoever calls the function, which is DALI in
the middle of a run, and damaged machine code ends the process. Here each file has a digest, a fault
costs a compilation, and a warning names the folder.
"""

import functools
import hashlib
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_DIGEST = 16  # bytes of BLAKE2b


def compiled(
    function: Callable | None = None, *, inline: Literal["never", "always"] = "never"
) -> Callable:
    """The function compiled by Numba, at its first call. The machine code is kept beside the
    module or in the user's cache, if one of them is writable. Calls release the GIL.

    inline: `always` makes it a part of the compiled functions of its module that call it, where it
    can become vector instructions; see numba.njit. Without a function: a decorator.

    Warns (RuntimeWarning) where kept machine code cannot be read, or new code cannot be kept.
    """
    if function is None:
        return functools.partial(compiled, inline=inline)
    dispatcher: Any = numba.njit(function, nogil=True, inline=inline)
    if hasattr(dispatcher, "enable_caching"):  # not with NUMBA_DISABLE_JIT
        # Neither folder is writable; or this Numba's cache is another than the one that is known.
        with suppress(RuntimeError, AttributeError):
            dispatcher._cache = _MachineCode(function)
    return dispatcher


class _MachineCode(FunctionCache):
    """The files of one function. A fault of theirs is a warning, and never an error."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        base = f"{self._impl.filename_base}.checked"  # Numba's own files have no digest
        self._cache_file = _Files(self._cache_path, base, self._cache_file._source_stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # Numba unpickles and links, and either can raise anything
            self._begin_anew(error)
            return None  # so that Numba compiles

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:  # damaged meanwhile, or a full disk
            self._give_up(error)

    def _begin_anew(self, fault: Exception) -> None:
        try:
            self.flush()
        except OSError as error:
            self._give_up(error)
            return
        _warn(self.cache_path, f"is damaged ({_reason(fault)}), so it is compiled anew")

    def _give_up(self, fault: Exception) -> None:
        self.disable()
        _warn(
            self.cache_path,
            f"cannot be kept ({_reason(fault)}), so every process compiles it, which takes "
            "seconds: make room there, delete the files *.nbi and *.nbc, or name another folder by "
            "the environment variable NUMBA_CACHE_DIR",
        )


class _Files(IndexDataCacheFile):
    """An index, and a file of machine code for each signature. What is pickled in them is followed
    by its digest, which unpickling leaves aside."""

    def _dump(self, content: Any) -> bytes:
        pickled = super()._dump(content)
        return pickled + _digest(pickled)

    def _load_index(self) -> dict[Any, str]:
        with suppress(FileNotFoundError), open(self._index_path, "rb") as file:
            if pickle.load(file) == self._version:
                _check(file.read())
        return super()._load_index()

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            _check(file.read())
        return super()._load_data(name)


def _digest(pickled: bytes) -> bytes:
    return hashlib.blake2b(pickled, digest_size=_DIGEST).digest()


def _check(content: bytes) -> None:
    if _digest(content[:-_DIGEST]) != content[-_DIGEST:]:
        raise ValueError("its digest is another one")


def _reason(fault: Exception) -> str:
    return fault.strerror if isinstance(fault, OSError) and fault.strerror else repr(fault)


def _warn(folder: str, what: str) -> None:
    # Python shows equal texts once, so the text does not name the function.
    warnings.warn(f"Numba's machine code in {folder} {what}", RuntimeWarning, stacklevel=2)
