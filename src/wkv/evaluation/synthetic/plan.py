"""From a preset and a user's changes to cases: what is trained, how, and what it is tested on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wkv.errors import WkvError
from wkv.evaluation.synthetic.contenders import Frame
from wkv.evaluation.synthetic.presets import PRESETS
from wkv.evaluation.synthetic.streams import Part, test_samples
from wkv.evaluation.synthetic.task import create_task, list_tasks
from wkv.evaluation.synthetic.trainer import Settings

MERGED = ("task", "model", "frame", "train")  # the tables of a section; everything else is replaced as a whole


@dataclass(frozen=True)
class Changes:
    """What a user changes in a preset; None leaves it.

    Args:
        task: options of the task.
        frame: fields of `Frame`.
        train: fields of `Settings`.
        learning_rates: to choose from.
        widths: hidden sizes at which every contender runs that names none.
        lengths: to test at.
    """

    task: Mapping[str, Any] = field(default_factory=dict)
    frame: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: Sequence[float] | None = None
    widths: Sequence[int] | None = None
    lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Case:
    """One comparison: all contenders learn the same thing and are tested on the same samples.

    Args:
        label: what tables call it; empty where a preset has one case.
        parts, tests: what to train and to test on.
        model: sizes for contenders that name none.
        frame: what is changed around the mixers.
        settings: training, with the first learning rate.
        learning_rates: to choose from.
        widths: hidden sizes for contenders that name none.
    """

    label: str
    parts: Sequence[Part]
    tests: Sequence[Part]
    model: Mapping[str, Any]
    frame: Frame
    settings: Settings
    learning_rates: Sequence[float]
    widths: Sequence[int]

    @property
    def vocab_size(self) -> int:
        """Of all its parts together."""
        return max(part.task.vocab_size for part in (*self.parts, *self.tests))


def make_cases(task: str, preset: str = "default", changes: Changes | None = None) -> list[Case]:
    """The cases of a preset for one task.

    Args:
        task: its name.
        preset: a name from `presets.PRESETS`. A task that `quick` and `default` do not know takes its own options
            there and what all their tasks share.
        changes: on top of the preset.

    Raises:
        WkvError: for an unknown task, preset or option, and for changes of what the preset itself varies.
    """
    changes = changes or Changes()
    section = _section(task, preset)
    varied = _varied(section)
    fixed = sorted(varied & changes.task.keys())
    if fixed:
        raise WkvError(f"the preset {preset} varies {', '.join(fixed)} itself; choose another preset to set it")
    merged = _merge(section, {name: dict(getattr(changes, name)) for name in ("task", "frame")})
    merged = {**merged, **_given(changes, "learning_rates", "widths", "lengths")}
    return [_case(task, _merge(merged, case), changes) for case in section.get("cases", [{}])]


def _section(task: str, preset: str) -> dict[str, Any]:
    if task not in list_tasks():
        raise WkvError(f"task {task!r} is unknown; one of {', '.join(list_tasks())}")
    if preset not in PRESETS:
        raise WkvError(f"preset {preset!r} is unknown; one of {', '.join(PRESETS)}")
    sections = PRESETS[preset]
    if "" not in sections and task not in sections:
        raise WkvError(f"the preset {preset} is for {', '.join(sections)}; for {task} take quick or default")
    return _merge(sections.get("", {}), sections.get(task, {}))


def _merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    tables = {name: {**base.get(name, {}), **more.get(name, {})} for name in MERGED}
    return {**base, **more, **tables}


def _varied(section: Mapping[str, Any]) -> set[str]:
    """Options of the task that differ within the preset."""
    parts = [*section.get("tests", []), *(part.get("task", {}) for part in section.get("mix", []))]
    parts += [case.get("task", {}) for case in section.get("cases", [])]
    return {name for part in parts for name in part}


def _given(changes: Changes, *names: str) -> dict[str, Any]:
    return {name: getattr(changes, name) for name in names if getattr(changes, name) is not None}


def _case(task: str, section: Mapping[str, Any], changes: Changes) -> Case:
    rates = list(section["learning_rates"])
    if not rates:
        raise WkvError("a comparison needs at least one learning rate")
    mix = section.get("mix", [{}])
    parts = [_part(task, section, part.get("task", {}), part.get("samples")) for part in mix]
    tests = _tests(task, section)
    for part in (*parts, *tests):
        test_samples(part, 1)  # a length that the task refuses is refused before anything is trained
    return Case(
        label=section.get("label", ""),
        parts=parts,
        tests=tests,
        model=section["model"],
        frame=Frame(**section["frame"]),
        settings=_settings(rates[0], section["train"], changes.train),
        learning_rates=rates,
        widths=section.get("widths", ()),
    )


def _part(task: str, section: Mapping[str, Any], options: Mapping[str, Any], samples: int | None = None) -> Part:
    return Part(create_task(task, **{**section["task"], **options}), samples)


def _tests(task: str, section: Mapping[str, Any]) -> list[Part]:
    if "tests" in section and "lengths" in section:
        raise WkvError("the preset has its own test samples; leave the lengths out")
    if "tests" in section:
        parts = [_part(task, section, options) for options in section["tests"]]
        labels = [", ".join(f"{key}={value}" for key, value in options.items()) for options in section["tests"]]
        return [dataclasses.replace(part, label=label) for part, label in zip(parts, labels, strict=True)]
    alone = _part(task, section, {})
    return [dataclasses.replace(alone, length=length, label=str(length)) for length in section.get("lengths", ())] or [
        alone
    ]


def _settings(rate: float, preset: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """The preset's settings with the changes; a number of steps takes the place of epochs, and the other way round."""
    values = dict(preset)
    if changes.get("steps") is not None:
        values.pop("epochs", None)
    values.update(changes)
    known = {setting.name for setting in dataclasses.fields(Settings)} - {"learning_rate"}
    for name in values:
        if name not in known:
            raise WkvError(f"training has no setting {name!r}; one of {', '.join(sorted(known))}")
    return Settings(learning_rate=rate, **values)
