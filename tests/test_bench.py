"""`wkv bench` from end to end on a tiny model, and workers that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import wkv
from tests.ops.native_helpers import threads
from wkv import native
from wkv.cli import app
from wkv.errors import WkvError
from wkv.speed import process, report, rounds
from wkv.speed.bandwidth import buffer, read_seconds
from wkv.speed.bench import run
from wkv.speed.contenders import BEST_QUANTIZED, CONTENDERS, PEERS, QUANTIZED_PEERS, Contender, chosen
from wkv.speed.files import Shape, Weights, bytes_per_token, gguf_bytes, model_weights, random_model, shape_weights
from wkv.speed.plot import plot
from wkv.speed.process import Worker, WorkerError
from wkv.speed.rounds import Measured, Settings, Watch
from wkv.speed.worker import Session

needs_native = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.unavailable()}")
SMALL = Shape(1, 64, vocab_size=256, decay_rank=32, iclr_rank=32, value_rank=32, gate_rank=32)
FAST = Settings(
    threads=(1,), rounds=2, seconds=0.01, tokens=3, prompt=8, prefill_seconds=0, pause=0, bandwidth_bytes=2**20
)


def small_weights(folder: Path) -> Weights:
    return Weights(folder, SMALL.vocab_size, lambda: random_model(SMALL, 0))


def ours(weights: str = "fp32") -> Contender:
    return next(c for c in CONTENDERS if c.program == "wkv" and c.weights == weights)


def broken_worker(code: str) -> tuple[str, ...]:
    """A program that answers its first requests well, then runs `code`."""
    start = "import json, sys\nlines = iter(sys.stdin)\n"
    good = "next(lines); print(json.dumps({'bytes_read': 1, 'bytes_stored': 1}), flush=True)\n"
    logits = "next(lines); print(json.dumps({'logits': [1.0]}), flush=True)\nnext(lines)\n"
    return sys.executable, "-c", start + good + logits + code


# ---- the command ----


@needs_native
def test_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With three contenders, as each starts a process; all of them: test_every_contender_of_ours."""
    few = tuple(c for c in CONTENDERS if c.name in ("wkv fp32", "wkv int8", "wkv int4, mapped"))
    monkeypatch.setattr("wkv.speed.contenders.CONTENDERS", few)
    monkeypatch.setitem(rounds.QUICK, "bandwidth_bytes", 2**22)
    out = tmp_path / "bench.json"
    words = ["bench", "--shape", "tiny", "--quick", "--peers", "none", "--threads", "1", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["complete"] is True
    assert set(found["skipped"]) == set(PEERS)
    assert {"what", "command", "versions", "hardware", "settings"} <= found.keys()
    shape = found["shapes"]["tiny"]
    names = {c.name for c in few}
    assert shape["failed"] == {}
    assert set(shape["contenders"]) == set(shape["threads"]["1"]["contenders"]) == names
    assert len(shape["raw_rounds"]) == 2
    for row in shape["threads"]["1"]["contenders"].values():
        assert row["decode_tokens_per_second"] > 0
        assert row["prefill_tokens_per_second"] > 0
        assert row["bandwidth_share_if_all_were_read"] >= row["bandwidth_share"] > 0
    for name, facts in shape["contenders"].items():
        assert facts["cosine_of_logits"] > 0.95, name
    assert shape["contenders"]["wkv int8"]["bytes_read"] < shape["contenders"]["wkv int8"]["bytes_stored"]
    assert 0.3 < shape["contenders"]["wkv int8"]["skipped_share"] < 0.7
    assert (tmp_path / "bench.md").read_text().startswith("### tiny, 1 thread")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md", "bench.png"]


@needs_native
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "gpt"], "peer 'gpt' is unknown"),
        (["--threads", "0"], "--threads is a list"),
        (["--threads", "1,x"], "--threads is a list"),
        (["--shape", "7b"], "shape '7b' is unknown"),
        (["--out", "bench.txt"], "ends in .json"),
        (["--out", "missing/bench.json"], "does not exist"),
        (["missing.pth"], "missing.pth"),
    ],
)
def test_command_refuses(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *words])
    assert isinstance(result.exception, WkvError)
    assert message in str(result.exception)


def test_own_model(tmp_path: Path) -> None:
    """A checkpoint is measured from its own weights; another version is refused."""
    path = tmp_path / "mine.safetensors"
    wkv.save_model(random_model(SMALL, 1), path)
    weights = model_weights(path, tmp_path / "cache")
    copy = wkv.load_model(weights.path(ours()))
    assert weights.vocab_size == SMALL.vocab_size
    assert torch.equal(copy.head.weight, wkv.load_model(path).head.weight)
    other = wkv.create_model("rwkv6", vocab_size=256, hidden_size=64, num_layers=1)
    wkv.save_model(other, tmp_path / "six.safetensors")
    with pytest.raises(WkvError, match="compares RWKV-7 models"):
        model_weights(tmp_path / "six.safetensors", tmp_path / "cache")


def test_peers_are_found_but_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    contenders, skipped = chosen("auto")
    assert {c.program for c in contenders} == {"wkv"}
    assert skipped["rwkv"] == "not installed: pip install rwkv==0.8.32"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    contenders, skipped = chosen("llama.cpp")
    assert {c.program for c in contenders} == {"wkv", "llama.cpp"}
    assert skipped == {"rwkv": "not asked for"}
    assert "llama_cpp" not in sys.modules


# ---- files ----


def test_files_are_written_once(tmp_path: Path) -> None:
    weights = shape_weights("tiny", tmp_path, 0)
    path = weights.path(ours("int4"))
    before = path.stat().st_mtime_ns
    assert weights.path(ours("int4")) == path
    assert path.stat().st_mtime_ns == before
    assert path != weights.path(ours("int8 tiled")) != weights.path(ours("int4 head"))


def test_bytes_per_token(tmp_path: Path) -> None:
    """Everything but the embedding's other rows and the first layer's value residual; the same in a GGUF file."""
    weights = small_weights(tmp_path)
    model = weights.model
    unread = 255 * 64 + 64 + 2 * 64 * 32
    assert bytes_per_token(model) == 4 * (model.num_parameters - unread)
    gguf = weights.path(next(c for c in CONTENDERS if c.weights == "F32"))
    assert gguf_bytes(gguf) == bytes_per_token(model)


# ---- workers ----


@needs_native
def test_every_contender_of_ours(tmp_path: Path) -> None:
    """What its process does, in this one."""
    weights = small_weights(tmp_path)
    found = {}
    with threads(1):
        for contender in (c for c in CONTENDERS if c.program == "wkv"):
            session = Session()
            facts = session.load("wkv", str(weights.path(contender)), contender.weights, 8, None)
            assert 0 < facts["bytes_read"] <= facts["bytes_stored"], contender
            found[contender.name] = torch.tensor(session.logits([1, 2, 3], 1, 256)["logits"])
            assert session.decode([1, 2], 1, 0.0, 2)["tokens"] == 2
    for name, logits in found.items():
        assert torch.cosine_similarity(logits, found["wkv fp32"], 0) > 0.95, name


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((sys.executable, "-c", "raise SystemExit('no such chip')"), "ended with status 1: no such chip"),
        ((sys.executable, "-c", "input(); print('hello', flush=True); input()"), "answered 'hello'"),
        (process.COMMAND, "RuntimeError: no model is loaded"),
    ],
)
def test_worker_errors_are_one_line(command: Sequence[str], message: str) -> None:
    with Worker(command) as worker, pytest.raises(WorkerError, match=message) as caught:
        worker.ask("decode", tokens=[1], threads=1, seconds=0.0, count=1)
    assert "\n" not in str(caught.value)


def test_worker_reports_bad_requests_and_goes_on() -> None:
    with Worker() as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match="KeyError: 'dance'"):
                worker.ask("dance")


@needs_native
def test_a_contender_that_dies_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Contender("rwkv fp32", "rwkv", "fp32", 32)
    commands = iter([process.COMMAND, broken_worker("raise SystemExit('out of luck')"), process.COMMAND])
    monkeypatch.setattr(rounds, "Worker", lambda: Worker(next(commands)))
    measured = Measured()
    turns: list[str] = []
    rounds.measure([ours(), peer], small_weights(tmp_path), FAST, measured, Watch(turned=lambda: turns.append("")))
    assert measured.failed == {"rwkv fp32": "the worker ended with status 1: out of luck"}
    assert measured.complete
    assert len(measured.rounds) == 2
    for row in measured.rounds:
        assert set(row["1"]["decode"]) == set(row["1"]["prefill"]) == {"wkv fp32"}
    found = report.summary(measured, FAST.prompt)
    assert found["failed"] == measured.failed
    assert "bandwidth_share" not in found["threads"]["1"]["contenders"]["rwkv fp32"]


@needs_native
def test_a_contender_that_cannot_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = iter([(sys.executable, "-c", "raise SystemExit(3)"), process.COMMAND, process.COMMAND])
    monkeypatch.setattr(rounds, "Worker", lambda: Worker(next(commands)))
    measured = Measured()
    rounds.measure([ours("bf16"), ours()], small_weights(tmp_path), FAST, measured, Watch())
    assert measured.failed == {"wkv bf16": "the worker ended with status 3"}
    assert set(measured.facts) == {"wkv fp32"}


@needs_native
def test_an_interrupt_keeps_the_rounds(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    count = 0

    def turned() -> None:
        nonlocal count
        count += 1
        if count == 3:  # after decoding in the second round
            raise KeyboardInterrupt

    models = {"small": small_weights(tmp_path)}
    result = run(models, [ours()], FAST, Watch(turned=turned), lambda found: written.append(found), {"command": "x"})
    assert result["complete"] is False
    assert len(result["shapes"]["small"]["raw_rounds"]) == 2
    assert written[-1] is result
    row = result["shapes"]["small"]["threads"]["1"]["contenders"]["wkv fp32"]
    assert row["decode_ms"] > 0
    json.dumps(result)


def test_an_interrupt_before_the_first_round_still_writes(tmp_path: Path) -> None:
    def said(_: str) -> None:
        raise KeyboardInterrupt

    result = run({"small": small_weights(tmp_path)}, [ours()], FAST, Watch(said=said), lambda found: None, {})
    assert result["complete"] is False
    assert result["shapes"]["small"]["threads"] == {}
    assert report.markdown(result) == "\n"
    plot(result, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").is_file()


# ---- what is made of the times ----


def measured_rounds(times: list[dict[str, float]]) -> Measured:
    """Rounds in which decoding a token and reading the prompt take as many milliseconds and seconds."""
    measured = Measured(complete=True)
    for row in times:
        measured.facts |= {name: {"bytes_read": 5e8, "bytes_stored": 1e9} for name in row}
        decode = {name: {"ms": time} for name, time in row.items()}
        prefill = {name: {"seconds": time} for name, time in row.items()}
        pages = {"huge_pages": {"best": 1e10, "median": 9e9}, "usual_pages": {"best": 8e9, "median": 7e9}}
        bandwidth = {"best": 1e10, "bytes": 1, **pages}
        measured.rounds.append({"1": {"bandwidth": bandwidth, "decode": decode, "prefill": prefill}})
    return measured


def test_ratios_are_medians_of_pairs() -> None:
    """A machine that halves its speed between rounds changes no ratio."""
    times = [{"wkv fp32": 100.0 * s, "rwkv fp32": 100.0 * s * r} for s, r in ((1, 1.2), (2, 1.3), (1, 1.0))]
    found = report.summary(measured_rounds(times), 512)["threads"]["1"]
    (pair,) = [pair for pair in found["pairs"] if pair["phase"] == "decode"]
    assert (pair["times_faster"], pair["min"], pair["max"]) == pytest.approx((1.2, 1.0, 1.3))
    assert (pair["target"], pair["met"]) == (1.1, True)
    row = found["contenders"]["wkv fp32"]
    assert row["bandwidth_share"] == pytest.approx(0.5)
    assert row["share_of_bandwidth_in_usual_pages"] == pytest.approx(0.625)
    assert row["bandwidth_share_if_all_were_read"] == pytest.approx(1.0)
    floors = found["floor_targets"]
    assert [(floor["limit"], floor["met"]) for floor in floors] == [("usual_pages", False), ("huge_pages", False)]
    assert [floor["bandwidth_share"] for floor in floors] == pytest.approx([0.625, 0.5])
    assert "| wkv fp32 | rwkv fp32 | decode | 1.20 | 1.00 to 1.30 | 1.1 (met) |" in report.markdown(
        {"shapes": {"x": {"threads": {"1": found}}}}
    )


def test_best_quantised_peer_needs_all_of_them() -> None:
    times = {"wkv int8": 2.0, **{name: 3.0 + place for place, name in enumerate(QUANTIZED_PEERS)}}
    pairs = report.summary(measured_rounds([times]), 512)["threads"]["1"]["pairs"]
    (best,) = [pair for pair in pairs if pair["peer"] == BEST_QUANTIZED]
    assert (best["phase"], best["times_faster"]) == ("prefill", 1.5)
    del times[QUANTIZED_PEERS[-1]]
    pairs = report.summary(measured_rounds([times]), 512)["threads"]["1"]["pairs"]
    assert BEST_QUANTIZED not in [pair["peer"] for pair in pairs]


# ---- bandwidth ----


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [512, 512 * 7, 2**20])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_whole_buffer_is_read(threads: int, size: int, huge_pages: bool) -> None:
    memory = buffer(size, huge_pages)
    assert len(read_seconds(memory, threads, 2)) == 2
    read = native.function("wkv_read_memory", "pii")
    words = torch.randint(-(2**62), 2**62, (size // 8,))
    memory.view(torch.int64).copy_(words)
    assert read(memory.data_ptr(), size, threads) == words.sum().item()
    with pytest.raises(WkvError, match="did not read the whole buffer"):
        read_seconds(memory, threads, 1)
