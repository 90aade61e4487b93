"""benchmarks/gpu/run.py on tiny shapes without a GPU: all parts, what is left out, and what is written when."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from wkv import ops
from wkv.ops import dispatch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks/gpu"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not part of this installation")


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("gpu_run", FOLDER / "run.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def part(name: str) -> ModuleType:
    return importlib.import_module(f"gpu_{name}")


def cpu() -> Any:
    return part("timing").Device("cpu", quick=True)


def test_the_whole_run(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "new/run.json"
    script.main(["--device", "cpu", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["command"].endswith("--device cpu --quick --out run.json")
    assert {"commit", "versions", "hardware"} <= found.keys()
    parts = found["parts"]
    assert list(parts) == list(script.SHARES)
    assert all("failed" not in rows for rows in parts.values())
    checks = parts["checks"]
    assert len(checks) == 18
    assert all(row["passed"] for row in checks.values())
    golden = [check["case"] for check in checks["wkv7 float32"]["checks"] if "golden" in check["case"]]
    assert len(golden) == 3
    for name, row in parts["operators"].items():
        assert row["forward"]["ms"].keys() == row["forward_backward"]["ms"].keys() == {"ours", "torch"}, name
        assert row["skipped"] == {"fla": "fla runs on GPUs only"}
        assert row["differences"]["ours"] < 1e-5
    assert parts["decode"]["tiny fp32 B2"]["tokens_per_second"].keys() == {"graphs", "no graphs"}
    assert parts["decode"]["tiny skipped"].keys() == {"int4, torch"}
    step = parts["training"]["2x32"]
    assert step["first_loss"]["ours"] == pytest.approx(step["first_loss"]["torch"], rel=1e-2)
    text = out.with_suffix(".md").read_text()
    for title in ("Limits of the device", "Checks", "Operators", "Decoding", "Training steps"):
        assert f"## {title}\n" in text
    assert "Tiny shapes" in text


def test_some_parts_and_operators(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    chosen = ["--parts", "checks", "operators", "--operators", "wkv5", "--backend", "chunked"]
    found = script.main(["--device", "cpu", "--quick", "--out", str(out), *chosen])
    assert found["parts"].keys() == {"checks", "operators"}
    assert all(name.startswith("wkv5 ") for rows in found["parts"].values() for name in rows)
    assert found["parts"]["checks"]["wkv5 float32"]["backend"] == "chunked"
    for wrong in (["--device", "cpu"], ["--parts", "nothing"]):
        with pytest.raises(SystemExit):
            script.main(wrong)


def test_without_time_everything_is_left_out(script: Any, tmp_path: Path) -> None:
    found = script.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "run.json"), "--seconds", "0"])
    for name in ("checks", "operators", "decode", "training"):
        rows = {key: row for key, row in found["parts"][name].items() if key != "tiny skipped"}
        assert rows
        assert all(row == {"skipped": "no time left"} for row in rows.values()), name
    assert "no time left" in (tmp_path / "run.md").read_text()


def test_a_part_that_fails_leaves_the_others_and_what_it_had(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: Any, budget: Any, known: Any, operators: Any, save: Any) -> Any:
        save({"first": {"skipped": "no"}})
        raise RuntimeError("out of something\nmore")

    for name in ("limits", "operators", "decode", "training"):
        monkeypatch.setitem(script.PARTS, name, fail)
    out = tmp_path / "run.json"
    script.main(["--device", "cpu", "--quick", "--out", str(out), "--operators", "wkv5"])
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == list(script.SHARES)
    assert parts["training"]["first"] == {"skipped": "no"}
    assert parts["training"]["failed"] == {"failed": "RuntimeError: out of something"}
    assert out.with_suffix(".md").read_text().count("out of something") == 4


# ---- checks in processes ----


def test_a_worker_writes_its_errors(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "row.json"
    script.main(["--device", "cpu", "--quick", "--worker", "wkv6", "float32", "--out", str(out)])
    assert json.loads(out.read_text())["passed"]


@pytest.mark.usefixtures("script")
def test_processes_that_answer_fail_or_hang(tmp_path: Path) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(
        textwrap.dedent("""
        import json, sys, time
        _, _, operator, dtype, _, out = sys.argv
        if operator == "hangs":
            time.sleep(60)
        if operator == "fails":
            sys.exit("no such kernel")
        open(out, "w").write(json.dumps({"passed": True}))
        """)
    )
    checks, budget = part("checks"), part("timing").Budget
    todo = [("answers", "float32"), ("fails", "float32")]
    found = dict(checks.in_processes(todo, budget(60), fake))
    assert found == {"answers float32": {"passed": True}, "fails float32": {"failed": "no such kernel"}}
    began = time.monotonic()
    found = dict(checks.in_processes([("hangs", "float32")] * 40, budget(0.3), fake))
    assert found == {"hangs float32": {"skipped": "no time left"}}
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("script")
def test_wrong_results_and_errors_of_kernels_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Any:
        y, state = dispatch._table("wkv5")["chunked"].function(*given)
        return 1.1 * y, state

    def broken(*given: Any) -> Any:
        raise RuntimeError("does not compile")

    checks, tables = part("checks"), part("tables")
    device = part("timing").Device("cpu", quick=True, backend="native")
    for function in (wrong, broken):
        monkeypatch.setitem(dispatch._operators["wkv5"], "native", dispatch.Backend("native", function))
        row = checks.checked("wkv5", "float32", device)
        assert not row["passed"]
        text = "\n".join(tables.checks({"wkv5 float32": row}))
        assert "**failed**" in text
        assert ("above" in text) == (function is wrong)
        assert ("does not compile" in text) == (function is broken)


# ---- times ----


@pytest.mark.usefixtures("script")
def test_turns() -> None:
    timing = part("timing")

    def fail() -> None:
        raise MemoryError("too large\nby far")

    calls = {"ours": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.02), "none": fail}
    found = timing.turns(cpu(), calls, timing.Budget(60))
    assert found["dropped"] == {"none": "MemoryError: too large"}
    assert found["ratios"]["slow"]["median"] > 2
    assert found["rounds"] == 2
    found = timing.turns(cpu(), {"ours": fail, "slow": calls["slow"]}, timing.Budget(60))
    assert "ratios" not in found
    assert found["ms"].keys() == {"slow"}
    assert timing.turns(cpu(), {"ours": fail}, timing.Budget(60))["ms"] == {}


@pytest.mark.usefixtures("script")
def test_batches_are_halved_until_they_fit() -> None:
    halved = part("timing").halved
    assert halved(8, 10, 80) == 8
    assert halved(8, 10, 79) == 4
    assert halved(8, 1000, 1) == 1


@pytest.mark.usefixtures("script")
def test_roofline() -> None:
    operators = part("operators")
    case = operators.Case("wkv7", 2, 8, 3, 64)
    limits = {"bytes_per_second": 1e6, "flops_per_second": 1e12}
    found = operators.roofline(case, limits, 1.0)
    assert found["bytes"] == 20 * 2 * 8 * 3 * 64 * 2
    assert found["flops"] == pytest.approx(3 * 2 * 8 * 3 * (16 * 16 * 64 + 8 * 64 * 64 + 2 / 3 * 16**2))
    assert found["bound_by"] == "bytes"
    assert found["share"] == pytest.approx(found["bytes"] / 1e6)


# ---- fla ----


@pytest.mark.usefixtures("script")
def test_fla_is_plugged_in_for_a_turn_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With our own form in fla's place, which gets what the backends of the library get."""
    operators, training = part("operators"), part("training")
    seen = []

    def stand_in(x: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append({tensor.dtype for tensor in x.values()})
        return dispatch._table("wkv7")["chunked"].function(*x.values(), None, None, None)[0]

    monkeypatch.setattr(training, "fla", lambda operator: stand_in)
    before = dict(dispatch._operators["wkv7"])
    x = operators.arguments(operators.Case("wkv7", 1, 20, 2, 16, torch.float32), torch.device("cpu"))
    with training.plugged(training.fla_backend):
        assert dispatch._operators["wkv7"] != before
        y, _ = ops.wkv7(**x, state=torch.zeros(1, 2, 16, 16))
    assert dispatch._operators["wkv7"] == before
    assert seen == [{torch.bfloat16}]
    expected, _ = ops.wkv7(**x)
    assert float((y - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.usefixtures("script")
def test_fla_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = part("operators")
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ImportError, match="pip install --no-deps fla-core"):
        operators.fla("wkv7")


@pytest.mark.usefixtures("script")
def test_weights_of_eight_bits() -> None:
    """torch's product, and the check before it is used."""
    decode = part("decode")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    product, bar = decode.KINDS["int8, torch"]
    decode.check(weight, product(weight), bar)
    with pytest.raises(RuntimeError, match=r"off by \d"):
        decode.check(weight, Doubled(weight), 0.02)


class Doubled(torch.nn.Linear):
    """A product that is wrong."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight.data = 2 * weight
