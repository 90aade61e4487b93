"""Finding, loading and refusing the native library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import wkv
from wkv import native
from wkv.errors import WkvError
from wkv.native import library
from wkv.ops import backends, use_backend, wkv7

NO_COMPILER = not any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after an installation without a compiler."""
    native.function.cache_clear()
    monkeypatch.setattr(library._Loaded, "library", None)
    monkeypatch.setattr(library._Loaded, "tried", False)
    monkeypatch.setattr(library, "_find", lambda: None)
    yield
    native.function.cache_clear()


@pytest.mark.skipif(NO_COMPILER, reason="this machine has no C++ compiler")
def test_it_was_built() -> None:
    """A failed build installs the package without the kernels: where there is a compiler that must not pass unseen."""
    assert native.unavailable() is None


def test_nothing_native_is_loaded_at_import() -> None:
    code = "import wkv, sys; assert not any('wkv.native' in m for m in sys.modules); wkv.list_models()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_library_everything_goes_through_torch(absent: None) -> None:
    assert "compiler" in str(native.unavailable())
    status = {s.name: s for s in backends("wkv7")}["native"]
    assert not status.usable
    assert "compiler" in status.reason
    x = torch.randn(1, 3, 1, 8)
    y, _ = wkv7(x, -x.abs(), x, x, x, x)
    assert y.isfinite().all()
    with use_backend("native"), pytest.raises(WkvError, match="compiler"):
        wkv7(x, -x.abs(), x, x, x, x)
    with pytest.raises(WkvError, match="not available"):
        native.function("wkv_abi_version", "")
    model = wkv.create_model("rwkv7", vocab_size=300, hidden_size=64, num_layers=1)
    model.tokenizer = wkv.tokenizers.ByteTokenizer()
    assert wkv.generate(model, "a", max_tokens=2).prompt_tokens == 1


@pytest.mark.skipif(not native.available(), reason="native kernels are not built")
def test_libraries_of_another_build_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, path = library._Loaded.library, library._find()
    assert path is not None
    try:
        with pytest.raises(WkvError, match="cannot be loaded"):
            native.load(tmp_path / "missing.so")
        (tmp_path / "text.so").write_text("not a library")
        with pytest.raises(WkvError, match="cannot be loaded"):
            native.load(tmp_path / "text.so")
        monkeypatch.setattr(library, "ABI_VERSION", 999)
        with pytest.raises(WkvError, match="another build"):
            native.load(path)
    finally:
        library._Loaded.library, library._Loaded.reason = before, None
        native.function.cache_clear()


@pytest.mark.skipif(not native.available(), reason="native kernels are not built")
def test_instruction_sets() -> None:
    best = native.instruction_set()
    with native.use_instruction_set("portable"):
        assert native.instruction_set() == "portable"
    assert native.instruction_set() == best
    with pytest.raises(WkvError, match="unknown"), native.use_instruction_set("mmx"):
        pass
    other = "neondot" if best != "neondot" else "avx2"
    with pytest.raises(WkvError, match="not available on this machine"), native.use_instruction_set(other):
        pass
    with pytest.raises(WkvError, match="another build"):
        native.function("wkv_no_such_function", "")


@pytest.mark.skipif(not native.available(), reason="native kernels are not built")
def test_the_own_thread_pool() -> None:
    """Where torch's OpenMP runtime is not GNU's, the kernels run on threads of their own, with the same results."""
    use = native.function("wkv_use_openmp", "ppp", "")
    tensors = [torch.randn(3, 40, 2, 16) for _ in range(6)]
    tensors[1] = -tensors[1].abs()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = wkv7(*tensors)
        use(None, None, None)
        for _ in range(50):
            found = wkv7(*tensors)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)
        assert library._Loaded.library is not None
        library._share_threads_with_torch(library._Loaded.library)


def test_numpy_is_not_disturbed() -> None:
    """The kernels leave the floating-point environment (rounding, denormals) as it is."""
    x = torch.randn(1, 20, 1, 16)
    wkv7(x, -x.abs(), x, x, x, x)
    assert np.float32(1e-45) / np.float32(1) != 0
