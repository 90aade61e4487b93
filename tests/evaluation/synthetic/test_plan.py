"""From presets and changes to cases."""

from __future__ import annotations

from typing import Any

import pytest

from wkv.errors import WkvError
from wkv.evaluation.synthetic.contenders import Frame
from wkv.evaluation.synthetic.plan import Changes, make_cases
from wkv.evaluation.synthetic.presets import PRESETS
from wkv.evaluation.synthetic.task import list_tasks


def test_every_section_of_every_preset_is_sound() -> None:
    for preset, sections in PRESETS.items():
        for task in filter(None, sections):
            for case in make_cases(task, preset):
                assert case.parts
                assert case.tests
                assert (case.settings.steps is None) == all(part.samples for part in case.parts)


@pytest.mark.parametrize("preset", ["quick", "default"])
def test_a_task_without_a_section_takes_what_all_share(preset: str) -> None:
    for task in set(list_tasks()) - PRESETS[preset].keys():
        [case] = make_cases(task, preset)
        assert case.parts == case.tests
        assert case.model["num_layers"] == 2


def test_the_protocol_of_zoology() -> None:
    cases = make_cases("mqar", "zoology")
    assert [case.label for case in cases] == ["T=64, K=4", "T=128, K=8", "T=256, K=16", "T=512, K=64"]
    assert [case.settings.batch_size for case in cases] == [512, 512, 256, 128]
    for case in cases:
        assert (case.settings.epochs, case.settings.weight_decay, case.settings.warmup) == (64, 0.1, 0.0)
        assert case.frame == Frame(channel_mix=False, tied_head=True)
        assert [part.samples for part in case.parts] == [100_000]
        assert case.vocab_size == 8192
        assert case.parts[0].task.options["noise"] is False


def test_the_protocol_of_based_trains_on_a_mixture_and_tests_beyond_it() -> None:
    [case] = make_cases("mqar", "based")
    assert [part.samples for part in case.parts] == [100_000, 20_000, 20_000, 20_000, 20_000]
    assert [part.task.options["pairs"] for part in case.parts] == [4, 8, 16, 32, 64]
    assert [part.label for part in case.tests][-1] == "length=1024, pairs=256"
    assert case.parts[0].task.options["noise"] is True


def test_changes_come_on_top() -> None:
    changes = Changes(
        task={"pairs": 2}, frame={"channel_mix": True}, train={"steps": 7}, learning_rates=[0.1], widths=[16, 32],
        lengths=[16, 32],
    )  # fmt: skip
    [case] = make_cases("mqar", "quick", changes)
    assert case.parts[0].task.options["pairs"] == 2
    assert case.frame == Frame(channel_mix=True, tied_head=True)
    assert (case.settings.steps, case.settings.learning_rate) == (7, 0.1)
    assert (case.learning_rates, case.widths) == ([0.1], [16, 32])
    assert [(part.length, part.label) for part in case.tests] == [(16, "16"), (32, "32")]


def test_steps_take_the_place_of_epochs() -> None:
    [case] = make_cases("mqar", "based", Changes(train={"steps": 7}))
    assert (case.settings.steps, case.settings.epochs) == (7, None)


@pytest.mark.parametrize(
    ("task", "preset", "changes", "message"),
    [
        ("chess", "quick", {}, "task 'chess' is unknown; one of .*mqar"),
        ("mqar", "slow", {}, "preset 'slow' is unknown; one of quick"),
        ("running_parity", "based", {}, "the preset based is for mqar; for running_parity take quick or default"),
        ("mqar", "zoology", {"task": {"pairs": 2}}, "the preset zoology varies pairs itself"),
        ("mqar", "based", {"lengths": [8]}, "has its own test samples"),
        ("mqar", "quick", {"learning_rates": []}, "at least one learning rate"),
        ("mqar", "quick", {"train": {"speed": 1}}, "no setting 'speed'; one of batch_size"),
        ("mqar", "quick", {"train": {"learning_rate": 1}}, "no setting 'learning_rate'"),
        ("mqar", "quick", {"train": {"epochs": 1}}, "either steps or epochs"),
        ("mqar", "quick", {"task": {"colour": 1}}, "colour"),
        ("mqar", "quick", {"lengths": [3]}, "length|pairs"),
    ],
)
def test_what_is_refused(task: str, preset: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        make_cases(task, preset, Changes(**changes))
