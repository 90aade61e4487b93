"""Comparisons from start to end, interrupted and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wkv.errors import WkvError
from wkv.evaluation.synthetic import comparison
from wkv.evaluation.synthetic.comparison import Run, Watch, compare
from wkv.evaluation.synthetic.plan import Changes

CHANGES = Changes(
    task={"vocab_size": 32, "length": 16, "pairs": 2},
    train={"steps": 4, "batch_size": 4, "eval_every": 2, "validation_samples": 8, "test_samples": 8},
)


class Count(Watch):
    def __init__(self, stop_after: int = 100) -> None:
        self.started_runs: list[str] = []
        self.known: list[bool] = []
        self.stop_after = stop_after

    def started(self, run: Run, place: int, total: int) -> None:
        if len(self.started_runs) == self.stop_after:
            raise KeyboardInterrupt
        self.started_runs.append(run.name)

    def finished(self, run: Run, row: dict[str, Any], known: bool) -> None:
        self.known.append(known)


def small(out: Path | None = None, **options: Any) -> dict[str, Any]:
    options = {"contenders": ["rwkv4", "rwkv7:head_size=16,label=ours"], "changes": CHANGES, **options}
    return compare("mqar", preset="quick", out=out, **options)


def test_a_comparison_and_its_files(tmp_path: Path) -> None:
    result = small(tmp_path / "out", seeds=[0, 1])
    assert json.loads((tmp_path / "out/result.json").read_text()) == result
    [case] = result["cases"]
    assert [entry["contender"] for entry in case["entries"]] == ["rwkv4", "ours"]
    assert [entry["seeds"] for entry in case["entries"]] == [[0, 1], [0, 1]]
    assert len(list((tmp_path / "out/runs").glob("ours-lr=0.005-seed=1-*.json"))) == 1
    row = result["runs"][1]
    assert row["options"] == {"hidden_size": 32, "num_layers": 2, "head_size": 16, "vocab_size": 32}
    assert row["train_parts"][0]["options"]["pairs"] == 2
    assert (row["steps"], row["settings"]["steps"], row["seed"]) == (4, 4, 0)
    assert row["state_bytes"] == 4 * 2 * (32 + 32 * 16)  # the channel mixes are left out by the preset
    assert row["evidence"].keys() >= {"commit", "versions", "hardware", "device"}
    assert set(row["tests"][0]) == {
        "label", "length", "accuracy", "sequence_accuracy", "last_accuracy", "loss", "state_bytes",
    }  # fmt: skip


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    first, second, third = Count(stop_after=1), Count(), Count()
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, watch=first)
    small(tmp_path, watch=second)
    whole = small(tmp_path, watch=third)
    assert (first.started_runs, first.known) == (["rwkv4 lr=0.005 seed=0"], [False])
    assert (second.started_runs, second.known) == (["ours lr=0.005 seed=0"], [True, False])
    assert third.known == [True, True]
    fresh = small()
    for kept, new in zip(whole["runs"], fresh["runs"], strict=True):
        assert kept["curve"] == new["curve"]


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    small(tmp_path, contenders=["rwkv4"])
    watch = Count()
    changes = Changes(task=CHANGES.task, train={**CHANGES.train, "steps": 5})
    small(tmp_path, contenders=["rwkv4"], changes=changes, watch=watch)
    assert len(watch.started_runs) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_widths_for_those_that_name_none(tmp_path: Path) -> None:
    changes = Changes(task=CHANGES.task, train=CHANGES.train, widths=[16, 32])
    result = small(contenders=["rwkv4", "rwkv7:hidden_size=48"], changes=changes)
    found = [(entry["contender"], entry["width"]) for entry in result["cases"][0]["entries"]]
    assert found == [("rwkv4", 16), ("rwkv4", 32), ("rwkv7 hidden_size=48", None)]
    bytes_of_state = [entry["state_bytes"] for entry in result["cases"][0]["entries"]]
    assert bytes_of_state == [4 * 2 * 4 * 16, 4 * 2 * 4 * 32, 4 * 2 * (48 + 48 * 16)]


def test_the_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    small(contenders=["rwkv4"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    small(tmp_path, contenders=["rwkv4"])
    [path] = (tmp_path / "runs").iterdir()
    for text in ("{", "[]", '{"seed": 3}'):
        path.write_text(text)
        with pytest.raises(WkvError, match=rf"{path.name}: .* remove it to train anew"):
            small(tmp_path, contenders=["rwkv4"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": []}, "different labels"),
        ({"contenders": ["rwkv4", "rwkv4"]}, "different labels"),
        ({"seeds": []}, "seeds must lie between"),
        ({"seeds": [-1]}, "seeds must lie between"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"contenders": ["rwkv7:head_size=7"]}, "not a multiple of head_size"),
    ],
)
def test_what_is_refused_before_the_first_step(options: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "train_run", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(WkvError, match=message):
        small(**options)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WkvError, match="cannot be made"):
        small(tmp_path / "file")
