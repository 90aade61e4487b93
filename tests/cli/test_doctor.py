"""`wkv doctor`: which backend would run, and what it says of GPUs and triton where there is none."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from wkv import native, ops
from wkv.cli import app, doctor
from wkv.errors import WkvError
from wkv.ops import dispatch, gpu


def report() -> dict[str, Any]:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert isinstance(found, dict)
    return found


def shown() -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows(found: dict[str, Any], operator: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["backends"][operator]}


@pytest.mark.usefixtures("no_gpu")
def test_what_would_run_on_a_cpu() -> None:
    found = report()
    assert (found["device"], found["gpu"]) == ("cpu", None)
    for operator in doctor.OPERATORS:
        chosen = found["would run"][operator]
        if native.available():
            assert chosen == {"sequences": "native", "single tokens": "native"}
        assert all(rows(found, operator)[name]["usable"] for name in chosen.values())
    text = shown()
    assert "any length" in text
    assert "none that torch can use" in text
    assert "in this order: for sequences triton, native, chunked, reference" in text


@pytest.mark.usefixtures("no_gpu")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in words, and nothing tries to import it."""
    monkeypatch.setattr(gpu, "installed", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    found = report()
    assert found["triton"] == {"installed": False, "version": None, "interpreter": False}
    assert rows(found, "wkv7")["triton"]["reason"] == "triton is not installed: pip install triton"
    assert "triton is not installed: pip install triton" in shown()


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.skipif(not gpu.installed(), reason="triton is not installed")
@pytest.mark.parametrize("interpreted", [False, True])
def test_with_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: interpreted)
    found = report()
    assert found["triton"]["interpreter"] == interpreted
    row = rows(found, "wkv7")["triton"]
    assert row["usable"] == interpreted
    assert row["reason"] == ("" if interpreted else "runs on GPUs only")
    assert "triton" not in found["would run"]["wkv7"].values()
    text = shown()
    assert ("its interpreter is active" in text) == interpreted
    assert ("runs in Triton's interpreter, slowly, when asked for" in text) == interpreted


def test_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: facts.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(gpu, "installed", lambda: True)
    monkeypatch.setattr(gpu, "_old", lambda index: None)
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    found = doctor.collect()
    assert found["gpu"]["compute capability"] == "9.0"
    assert "Some GPU, compute capability 9.0, 128.0 GiB" in shown()
    assert rows(found, "wkv7")["triton"]["usable"]
    assert found["would run"]["wkv7"] == {"sequences": "triton", "single tokens": "triton"}
    assert found["quantised layers"].startswith("Triton kernels for up to 64 tokens")
    monkeypatch.setattr(gpu, "_old", lambda index: "needs compute capability 8.0, this GPU has 7.5")
    found = doctor.collect()
    assert "has 7.5" in rows(found, "wkv7")["triton"]["reason"]
    assert found["quantised layers"].endswith("has 7.5")
    assert found["would run"]["wkv7"] == {"sequences": "chunked", "single tokens": "reference"}


def test_would_run_is_what_select_takes() -> None:
    for length, x in ((5, torch.zeros(1, 5, 1, 16)), (1, torch.zeros(1, 1, 1, 16))):
        name = dispatch.would_run("wkv7", length=length)
        assert dispatch.select("wkv7", x) is dispatch._table("wkv7")[name].function
        with ops.use_backend("reference"):
            assert dispatch.would_run("wkv7", length=length) == "reference"
    with ops.use_backend("native"), pytest.raises(WkvError, match="no backend of wkv7 runs on cuda"):
        dispatch.would_run("wkv7", "cuda")
