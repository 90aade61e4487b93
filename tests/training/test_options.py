"""Every kind of run, from end to end: it learns, and goes on exactly after an interruption."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import wkv
from tests import small
from wkv.data import write_binidx
from wkv.data.sampling import RowSampler
from wkv.errors import CheckpointError, DataError, RecipeError, WkvError
from wkv.training import Recipe, estimate, load_recipe, parse_recipe, read_result, resume_recipe
from wkv.training.checkpoint import latest_checkpoint, load_training
from wkv.training.keys import describe_keys
from wkv.training.log import read_log
from wkv.training.sections import DataRecipe, TrainRecipe

from .helpers import recipe_values, tiny_model, write_corpus
from .test_train import losses, parameters, run


def recipe(folder: Path, data: dict[str, Any] | None = None, **train: Any) -> Recipe:
    values = recipe_values(write_corpus(folder / "corpus"), **train)
    values["data"] |= data or {}
    return parse_recipe(values)


def write_chats(path: Path) -> Path:
    rows = [{"prompt": f"{i} and one?", "response": f"That is {i + 1}, of course."} for i in range(44)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def interrupted_equals_whole(plan: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of a run that is the same with and without an interruption."""
    monkeypatch.setattr("wkv.training.loop.draw_loss_curve", lambda *paths: None)  # a second each time
    run(plan, folder / "whole")
    original, drawn = RowSampler.next_batch, []

    def next_batch(self: RowSampler) -> Any:
        drawn.append(None)
        if len(drawn) == 13:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(RowSampler, "next_batch", next_batch)
        assert not run(plan, folder / "parts").finished
    assert run(resume_recipe(folder / "parts"), folder / "parts", resume=True).finished
    assert losses(folder / "parts") == losses(folder / "whole")
    whole, parts = (parameters(folder / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    return [row["loss"] for row in read_log(folder / "whole/log.csv") if "loss" in row]


@pytest.mark.parametrize(
    ("data", "train"),
    [
        ({"order": "prime"}, {"schedule": "wsd", "decay_fraction": 0.5}),
        ({"order": "packed"}, {"accumulate": 3, "ema": 0.8}),
        ({"order": "packed", "reset": False}, {"context_start": 8, "context_warmup_steps": 10, "context_length": 32}),
        ({"order": "padded"}, {"context_length": 4000, "tokens": 30000, "warmup_steps": 1, "batch_size": 1}),
        ({"order": "whole"}, {"context_length": 100, "segment": 40}),
        ({"order": "stream"}, {"segment": 10, "accumulate": 2}),
        ({"order": "stream", "reset": False}, {"segment": 10, "through": 2, "gradient_checkpointing": True}),
        ({"order": "random"}, {"segment": 7, "segment_mode": "exact", "precision": "bf16"}),
        ({"order": "random", "held_out_fraction": 0.0}, {"head_chunk": 16, "guard": 3, "spike": 20.0}),
    ],
)
def test_kinds_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], train: dict[str, Any]
) -> None:
    if "tokens" in train:
        train |= {"steps": None}
    found = interrupted_equals_whole(recipe(tmp_path, data, **train), tmp_path, monkeypatch)
    assert found[-1] < found[0]
    result = read_result(tmp_path / "whole")
    assert result is not None
    assert (result.bits_per_byte is None) == (data.get("held_out_fraction") == 0)
    if "tokens" in train:
        assert 30000 <= result.tokens < 30000 + 2000


@pytest.mark.parametrize("name", wkv.list_models())
def test_every_model_trains_on_a_stream_of_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values = recipe_values(write_corpus(tmp_path / "corpus"), steps=14, segment=10, ema=0.5)
    values["data"]["order"] = "stream"
    values["model"] = {"name": name, "num_layers": 2, "hidden_size": 32, **small.options(name, 16)}
    found = interrupted_equals_whole(parse_recipe(values), tmp_path, monkeypatch)
    assert found[-1] < found[0]


def test_conversations_with_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"source": str(write_chats(tmp_path / "chats.jsonl")), "order": "padded", "cache": str(tmp_path / "cache")}
    data |= {"tokenizer": "bpe", "vocab_size": 280}
    interrupted_equals_whole(recipe(tmp_path, data, context_length=100), tmp_path, monkeypatch)


def test_head_chunks_and_segments_change_nothing_but_rounding(tmp_path: Path) -> None:
    found = {}
    for name, options in {
        "plain": {},
        "chunk": {"head_chunk": 5},
        "exact": {"segment": 7, "segment_mode": "exact"},
    }.items():
        run(recipe(tmp_path, **options), tmp_path / name)
        found[name] = [row["loss"] for row in read_log(tmp_path / name / "log.csv") if "loss" in row]
    assert found["chunk"] == pytest.approx(found["plain"], abs=1e-4)
    assert found["exact"] == pytest.approx(found["plain"], abs=1e-4)


def test_averaged_parameters_are_evaluated_and_saved(tmp_path: Path) -> None:
    result = run(recipe(tmp_path, ema=0.9), tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run") or Path()
    raw, average, shown = (
        parameters(path) for path in (newest / "model.safetensors", newest / "ema.safetensors", result.model)
    )
    assert all(torch.equal(average[name], shown[name]) for name in raw)
    assert not all(torch.equal(average[name], raw[name]) for name in raw)
    text = (tmp_path / "corpus/19.txt").read_text()
    assert wkv.evaluation.bits_per_byte(wkv.load_model(result.model), [text]) == pytest.approx(result.bits_per_byte)


def test_checkpoints_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wkv.training import loop

    scores = iter([3.0, 1.0, 2.0, 2.5, 2.2, 9.9])
    monkeypatch.setattr(loop, "bits_per_byte", lambda *_: next(scores))
    plan = recipe(tmp_path, eval_every=4, checkpoint_every=5, keep_last=2, keep_best=True)
    run(plan, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000015", "step-00000020"]
    best = parameters(tmp_path / "run/best.safetensors")
    expected = parameters(tmp_path / "run/checkpoints/step-00000008/model.safetensors")
    assert all(torch.equal(best[name], expected[name]) for name in best)


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wkv.training import loop

    scores = iter([3.0, 2.0, 2.1, 2.2, 1.0])
    monkeypatch.setattr(loop, "bits_per_byte", lambda *_: next(scores))
    result = run(recipe(tmp_path, eval_every=2, stop_after=2), tmp_path / "run")
    assert (result.steps, result.finished, result.stopped_early) == (8, True, True)
    again = run(resume_recipe(tmp_path / "run"), tmp_path / "run", resume=True)
    assert (again.steps, again.stopped_early) == (8, True)


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float) -> None:
    from wkv.training import objective

    original, count = objective.head_loss, iter(range(1000))
    monkeypatch.setattr(
        objective, "head_loss", lambda *a, **k: original(*a, **k) * (factor if next(count) in calls else 1.0)
    )


@pytest.mark.parametrize("order", ["random", "stream"])
def test_bad_steps_are_skipped_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    poison(monkeypatch, {5, 6, 9}, float("nan"))
    result = run(recipe(tmp_path, {"order": order}, guard=2), tmp_path / "run")
    rows = [row for row in read_log(tmp_path / "run/log.csv") if "learning_rate" in row]
    assert [row["step"] for row in rows if row.get("skipped")] == [6, 7, 10]
    assert result.steps == len(rows) == 20
    assert all(torch.isfinite(value).all() for value in parameters(result.model).values())


def test_a_skipped_step_leaves_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {6, 7}, float("inf"))
    plan = recipe(tmp_path, steps=8, warmup_steps=1, guard=2)
    after = run(plan, tmp_path / "after")
    rows = [row for row in read_log(tmp_path / "after/log.csv") if "learning_rate" in row]
    assert [row["step"] for row in rows if row.get("skipped")] == [7, 8]
    moments = load_training(latest_checkpoint(tmp_path / "after") or Path())["optimizer"]["state"]
    assert {float(state["step"]) for state in moments.values()} == {6.0}
    assert after.finished


def test_spikes_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {30}, 1e4)
    run(recipe(tmp_path, steps=35, guard=1, spike=50.0), tmp_path / "run")
    rows = [row for row in read_log(tmp_path / "run/log.csv") if row.get("skipped")]
    assert [row["step"] for row in rows] == [31]


def test_too_many_bad_steps_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(12, 99)), float("nan"))
    with pytest.raises(WkvError, match=r"diverged at step 15 after 3 skipped steps: loss nan"):
        run(recipe(tmp_path, guard=3), tmp_path / "run")
    assert (latest_checkpoint(tmp_path / "run") or Path()).name == "step-00000010"


def test_a_full_disk_under_the_log_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wkv.training.log import RunLog

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        flush = close = lambda self: self.file.close()

    before = RunLog.__init__

    def broken(self: RunLog, *args: Any) -> None:
        before(self, *args)
        import csv

        self._file = Full(self._file)  # type: ignore[assignment]
        self._writer = csv.DictWriter(self._file, self._writer.fieldnames)

    monkeypatch.setattr(RunLog, "__init__", broken)
    with pytest.raises(CheckpointError, match=r"log\.csv cannot be written: No space left"):
        run(recipe(tmp_path), tmp_path / "run")


def saved_model(path: Path, tokenizer: Any = None) -> Path:
    model = tiny_model(seed=3)
    model.tokenizer = tokenizer
    wkv.save_model(model, path)
    return path


def continued(folder: Path, start: Path, **data: Any) -> Recipe:
    values = recipe_values(write_corpus(folder / "corpus"), start_from=str(start), learning_rate=1e-9)
    values["train"]["final_learning_rate"] = 1e-9
    del values["model"], values["data"]["tokenizer"]
    values["data"] |= data
    return parse_recipe(values)


def test_training_goes_on_from_a_checkpoint_with_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = saved_model(tmp_path / "start.safetensors", wkv.tokenizers.ByteTokenizer())
    interrupted_equals_whole(continued(tmp_path, start), tmp_path, monkeypatch)
    found, expected = parameters(tmp_path / "whole/model.safetensors"), parameters(start)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    assert wkv.load_model(tmp_path / "whole/model.safetensors").tokenizer.encode("a") == [97]


def test_checkpoints_that_cannot_be_continued(tmp_path: Path) -> None:
    plain = saved_model(tmp_path / "plain.safetensors")
    assert run(continued(tmp_path, plain, tokenizer="bytes"), tmp_path / "good").finished
    with pytest.raises(RecipeError, match=r"plain\.safetensors carries no tokenizer; give data\.tokenizer"):
        run(continued(tmp_path, plain), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"vocab_size is 256, the tokenizer has 65\d+ entries; give another"):
        run(continued(tmp_path, plain, tokenizer="world"), tmp_path / "run")
    own = saved_model(tmp_path / "own.safetensors", wkv.tokenizers.ByteTokenizer())
    with pytest.raises(RecipeError, match="was trained with another tokenizer"):
        run(continued(tmp_path, own, tokenizer="world"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="no such file"):
        run(continued(tmp_path, tmp_path / "none.pth"), tmp_path / "run")
    small = wkv.quantization.quantize_model(tiny_model(), 8)
    small.tokenizer = wkv.tokenizers.ByteTokenizer()
    wkv.save_model(small, tmp_path / "int8.safetensors")
    with pytest.raises(RecipeError, match="is quantised and cannot learn"):
        run(continued(tmp_path, tmp_path / "int8.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bpe_and_tokens_do_not_go_together(tmp_path: Path) -> None:
    write_binidx(tmp_path / "tokens", [[1, 2, 3] * 20] * 30)
    data = {"source": str(tmp_path / "tokens"), "tokenizer": "bpe", "vocab_size": 280}
    with pytest.raises(RecipeError, match="is trained on text"):
        run(recipe(tmp_path, data), tmp_path / "run")
    run(recipe(tmp_path, {"source": str(tmp_path / "tokens")}), tmp_path / "good")


@pytest.mark.parametrize(
    ("data", "train", "message"),
    [
        ({}, {"segment_mode": "exact"}, r"train\.segment_mode goes with train\.segment"),
        ({}, {"through": 2}, r"train\.through goes with train\.segment"),
        ({}, {"segment": 8, "segment_mode": "exact", "through": 2}, r"train\.through limits"),
        ({}, {"segment": 8, "head_chunk": 2}, r"train\.head_chunk"),
        ({}, {"sequence_parallel": 5}, r"train\.context_length \(24\) must be divisible by train\.sequence_parallel"),
        ({}, {"sequence_parallel": 2, "segment": 8}, r"train\.sequence_parallel divides rows"),
        ({}, {"sequence_parallel": 2, "head_chunk": 8}, r"train\.head_chunk goes without train\.sequence_parallel"),
        ({}, {"context_start": 8}, r"train\.context_start goes with"),
        ({}, {"context_start": 99, "context_warmup_steps": 2}, r"train\.context_start must be at most"),
        ({"order": "stream"}, {"context_start": 8, "context_warmup_steps": 2}, r"train\.context_start forgets"),
        ({}, {"spike": 3.0}, r"train\.spike goes with train\.guard"),
        ({"held_out_fraction": 0}, {"stop_after": 3}, r"train\.stop_after needs held-out text"),
        ({"held_out_fraction": 0}, {"keep_best": True}, r"train\.keep_best needs held-out text"),
        ({}, {"start_from": "x.pth"}, r"model\.\w+: the model comes from train\.start_from"),
        ({}, {"trackers": ["mlflow"]}, r"train\.trackers must be a list of tensorboard"),
        ({}, {"trackers": "wandb"}, r"train\.trackers: expected list"),
        ({}, {"ema": 1.0}, r"train\.ema must be"),
        ({"fields": {"txt": "a"}}, {}, r"data\.fields\.txt: there is no such key; did you mean text"),
        ({"fields": {"text": " "}}, {}, r"data\.fields\.text must be the name of a column"),
        ({"fields": "text"}, {}, r"data\.fields must be a mapping"),
        ({"order": "sorted"}, {}, r"data\.order must be one of random, prime"),
    ],
)  # fmt: skip
def test_impossible_combinations(tmp_path: Path, data: dict[str, Any], train: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, data, **train)


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="wandb is not installed: pip install wandb"):
        run(recipe(tmp_path, trackers=["wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trackers_get_the_recipe_and_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import accelerator, tracking

    seen: list[tuple[int | None, dict[str, Any]]] = []

    class Recorder(tracking.GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory = "trackio", False

        def __init__(self, run_name: str, **options: Any) -> None:
            super().__init__(_blank=True)
            assert (run_name, options) == ("wkv", {"name": "run"})

        def start(self) -> None: ...

        def finish(self) -> None:
            seen.append((None, {}))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            seen.append((0, values))

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            seen.append((step, values))

    monkeypatch.setattr("wkv.training.run.check_trackers", lambda names: None)
    monkeypatch.setattr(accelerator, "filter_trackers", lambda names, folder: ["trackio"] if names else [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    run(recipe(tmp_path, trackers=["trackio"]), tmp_path / "run")
    configuration = seen[0][1]
    assert (configuration["train.steps"], configuration["model.hidden_size"]) == (20, 32)
    assert all(isinstance(value, bool | int | float | str) for value in configuration.values())
    logged = [values["loss"] for step, values in seen[1:] if "loss" in values]
    rows = [row["loss"] for row in read_log(tmp_path / "run/log.csv") if "loss" in row]
    assert logged == pytest.approx(rows, rel=1e-8)
    assert [step for step, values in seen if "bits_per_byte" in values] == [10, 20]
    assert seen[-1] == (None, {})


@pytest.mark.parametrize("data", [{}, {"cache": "cache"}])
def test_an_estimate_counts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    plan = recipe(tmp_path, data, ema=0.9, accumulate=2)
    monkeypatch.chdir(tmp_path)
    found = estimate(plan)
    model = tiny_model()
    assert found.parameters == model.num_parameters == sum(group.values for group in found.groups)
    assert found.weights == found.gradients == found.average == 4 * model.num_parameters
    assert found.optimizer == pytest.approx(8 * model.num_parameters, rel=0.05)
    assert found.activations > 4 * 24 * 32 * 4 * 10
    assert (found.steps, found.tokens_per_step, found.tokens) == (20, 192, 3840)
    assert found.seconds == pytest.approx(20 * found.step_seconds)
    assert (found.corpus_tokens is None) == bool(data)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert estimate(recipe(tmp_path, data, steps=None, seconds=60.0)).seconds == 60
    assert estimate(recipe(tmp_path, data, steps=None, tokens=1000)).steps == 11


def test_checkpointing_and_segments_keep_less(tmp_path: Path) -> None:
    plain, *less = (
        estimate(recipe(tmp_path, **options)).activations
        for options in ({}, {"gradient_checkpointing": True}, {"segment": 6})
    )
    assert max(less) < 0.6 * plain


def test_every_key_has_a_meaning() -> None:
    described = {key: meaning for key, _, meaning in describe_keys()}
    fields = {
        f"{section}.{field.name}"
        for section, recipe in (("data", DataRecipe), ("train", TrainRecipe))
        for field in dataclasses.fields(recipe)
    }
    assert fields - {"data.fields"} <= set(described)
    assert all(described.values())


def test_the_recipe_for_continuing_needs_no_model() -> None:
    plan = load_recipe("continue", ["train.start_from=model.pth", "data.tokenizer=world"])
    assert (plan.model.sizes, plan.train.start_from) == ({}, "model.pth")
    with pytest.raises(RecipeError, match="leave the sizes out, as in the recipe `continue`"):
        load_recipe("demo", ["train.start_from=model.pth", "data.tokenizer=world", "data.vocab_size=null"])


def test_text_that_changed_under_a_run_is_noticed(tmp_path: Path) -> None:
    plan = recipe(tmp_path, {"order": "packed"})
    run(plan, tmp_path / "run")
    (tmp_path / "corpus/03.txt").write_text("another text")
    with pytest.raises(DataError, match="training text or its tokenizer has changed"):
        run(resume_recipe(tmp_path / "run", ["train.steps=25"]), tmp_path / "run", resume=True)
