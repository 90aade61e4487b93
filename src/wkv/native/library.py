"""Loading the library through ctypes: its interface is plain C, so one build serves every Python and every torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wkv.errors import WkvError

ABI_VERSION = 1
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vnni", "neondot")
_NAMES = ("libwkv_native.so", "libwkv_native.dylib", "wkv_native.dll")
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double, "": None}


class _Loaded:
    """The library in use, or why there is none."""

    library: ctypes.CDLL | None = None
    reason: str | None = None
    tried = False
    threads = "of its own"


def available() -> bool:
    """Whether the native kernels can be called."""
    return unavailable() is None


def unavailable() -> str | None:
    """None where the native kernels can be called, else the reason in words."""
    if not _Loaded.tried:
        _Loaded.tried = True
        path = _find()
        if path is None:
            _Loaded.reason = "built without a C++ compiler: install one (g++ or clang) and reinstall wkv"
        else:
            _load(path)
    return _Loaded.reason


def unusable(device: torch.device) -> str | None:
    """Why the native operators cannot run on `device`; None where they can."""
    return "runs on the CPU only" if device.type != "cpu" else unavailable()


# What torch.compiler.assume_constant_result does, but for its slow import: torch.compile does not trace the loading.
unusable.__dict__["_dynamo_marked_constant"] = True


def load(path: str | os.PathLike[str]) -> None:
    """Use the library at `path` in place of the installed one (a build with sanitizers, say).

    Raises:
        WkvError: if it cannot be loaded or belongs to another version of wkv.
    """
    _Loaded.tried = True
    function.cache_clear()
    _load(Path(path))
    if _Loaded.reason is not None:
        raise WkvError(f"{path}: {_Loaded.reason}")


@functools.cache
def function(name: str, parameters: str, returns: str = "i") -> Callable[..., Any]:
    """A function of the library, ready to call.

    Args:
        name: its C name.
        parameters: one letter each: p pointer (an address, None is null), i int64, f float, d double.
        returns: one such letter, or "" for nothing.

    Raises:
        WkvError: if the native library is not there.
    """
    reason = unavailable()
    if reason is not None:
        raise WkvError(f"the native kernels are not available: {reason}")
    try:
        found: Any = getattr(_Loaded.library, name)
    except AttributeError:
        raise WkvError(f"the native library has no function {name}: it is of another build; reinstall wkv") from None
    found.argtypes = [_TYPES[letter] for letter in parameters]
    found.restype = _TYPES[returns]
    called: Callable[..., Any] = found
    return called


def num_threads() -> int:
    """How many threads a native kernel may use: those of torch."""
    return torch.get_num_threads()


def threads() -> str:
    """Where the kernels' threads come from, in words."""
    return _Loaded.threads


def instruction_set() -> str:
    """The instruction set in use, one of `INSTRUCTION_SETS`."""
    return INSTRUCTION_SETS[function("wkv_instruction_set", "")()]


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run with a lesser instruction set inside the `with` block, as on an older processor.

    Raises:
        WkvError: if `name` is unknown, or this processor or build does not have it.
    """
    if name not in INSTRUCTION_SETS:
        raise WkvError(f"instruction set {name!r} is unknown; one of {', '.join(INSTRUCTION_SETS)}")
    use, before = function("wkv_use_instruction_set", "i"), INSTRUCTION_SETS.index(instruction_set())
    if use(INSTRUCTION_SETS.index(name)) != 0:
        raise WkvError(f"instruction set {name!r} is not available on this machine")
    try:
        yield
    finally:
        use(before)


def _find() -> Path | None:
    # An editable install has two folders: the sources, and where the build put its results.
    package = importlib.util.find_spec("wkv")
    for folder in (package and package.submodule_search_locations) or ():
        for name in _NAMES:
            path = Path(folder) / "native" / name
            if path.is_file():
                return path
    return None


def _load(path: Path) -> None:
    _Loaded.library = None
    try:
        library = ctypes.CDLL(str(path))
        version = library.wkv_abi_version
        version.restype = ctypes.c_int64
        found = version()
    except (OSError, AttributeError) as error:
        _Loaded.reason = f"the library cannot be loaded ({error}); reinstall wkv"
        return
    if found != ABI_VERSION:
        _Loaded.reason = f"the library is of another build (version {found}, expected {ABI_VERSION}); reinstall wkv"
        return
    _Loaded.library, _Loaded.reason = library, None
    _share_threads_with_torch(library)


def _share_threads_with_torch(library: ctypes.CDLL) -> None:
    """Let the kernels run on torch's own OpenMP threads, where that runtime is GNU's; else they keep their own pool.

    A second pool beside it would share the cores with threads that spin while they wait.
    """
    _Loaded.threads = "of its own"
    folder = Path(torch.__file__).parent
    for path in [*(folder / "lib").glob("libgomp*"), *folder.with_name("torch.libs").glob("libgomp*")]:
        runtime = ctypes.CDLL(str(path))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
        use = library.wkv_use_openmp
        use.argtypes, use.restype = [ctypes.c_void_p] * 3, None
        use(*addresses)
        _Loaded.threads = "shared with torch (OpenMP)"
        return
