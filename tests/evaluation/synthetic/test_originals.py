"""The original generators' samples, bit for bit (tests/golden/synthetic_benchmarks)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wkv.evaluation.synthetic import Samples, create_task, segment_seeds

GOLDEN = Path(__file__).parents[2] / "golden" / "synthetic_benchmarks"
NAMES = {  # of the originals' arguments; None: not an option here
    "input_seq_len": "length",
    "num_kv_pairs": "pairs",
    "power_a": "power",
    "random_non_queries": "noise",
    "num_updates": "updates",
    "seq_len": "length",
    "frac_noise": "noise_fraction",
    "num_tokens_to_copy": "tokens",
    "k_motif_size": "key_motif",
    "v_motif_size": "value_motif",
    "min_sequence_length": "min_length",
    "max_sequence_length": "max_length",
    "num_examples": None,
    "torch_manual_seed": None,
    "multi_query": None,
}
MQAR = {name: "mqar" for name in ("mqar_a", "mqar_b", "mqar_c", "mqar_d", "mqar_noise")}
RECALL = {**MQAR, "forgetting": "mqar_updates", "compositional": "mqar_compositional"}
MAD = ("in_context_recall", "noisy_recall", "memorization", "compression", "selective_copying")
LANGUAGES = ("parity", "even_pairs", "cycle_navigation", "modular_arithmetic")


@functools.cache
def golden() -> dict[str, Tensor]:
    return {name: tensor.long() for name, tensor in load_file(GOLDEN / "synthetic_samples.safetensors").items()}


def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
    return found


def golden_options(entry: str) -> dict[str, Any]:
    named = {NAMES.get(name, name): value for name, value in config()[entry].items()}
    return {name: value for name, value in named.items() if name is not None}


def assert_equal(samples: Samples, inputs: str, labels: str) -> None:
    assert torch.equal(samples.inputs, golden()[inputs])
    assert torch.equal(samples.labels, golden()[labels])


@pytest.mark.parametrize("entry", RECALL)
def test_zoology_recall(entry: str) -> None:
    task = create_task(RECALL[entry], **golden_options(entry))
    assert_equal(task.sample(6, config()["seed"], compat="zoology"), f"{entry}.inputs", f"{entry}.labels")


def test_zoology_parity() -> None:
    length = config()["zoology_parity"]["input_seq_len"]
    samples = create_task("parity").sample(6, 0, length=length, compat="zoology")
    assert_equal(samples, "zoology_parity.inputs", "zoology_parity.labels")


def test_zoology_cumulative_parity() -> None:
    length = config()["zoology_cumulative_parity"]["input_seq_len"] - 1  # it drops one
    samples = create_task("running_parity").sample(6, 0, length=length, compat="zoology")
    assert_equal(samples, "zoology_cumparity.inputs", "zoology_cumparity.labels")


def test_zoology_segment_seeds() -> None:
    found = config()["prepare_data_seeds"]
    assert segment_seeds(found["config_seed"], 5, 7) == (found["train5"], found["test7"])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", MAD)
def test_mad(name: str, split: str) -> None:
    options = golden_options(f"mad_{name}")
    if name == "in_context_recall":
        assert options.pop("noise_vocab_size") == 0
    samples = create_task(name, **options).sample(6, config()["seed"], split, compat="mad")
    assert_equal(samples, f"mad_{name}.{split}.inputs", f"mad_{name}.{split}.targets")


@pytest.mark.parametrize("name", LANGUAGES)
def test_xlstm_languages(name: str) -> None:
    options = golden_options(f"fl_{name}")
    vocab_size = options.pop("vocab_size")
    if name == "cycle_navigation":
        options["cycle"] = vocab_size - 4
    task = create_task(name, **options)
    assert task.vocab_size == vocab_size
    samples = task.sample(6, config()["seed"], compat="xlstm")
    asked = samples.labels >= 0
    assert torch.equal(torch.where(asked, samples.labels, samples.inputs), golden()[f"fl_{name}.tokens"])
    assert torch.equal(asked.long(), golden()[f"fl_{name}.mask"])
    assert not samples.inputs[asked].any()


@pytest.mark.parametrize(
    ("name", "compat"),
    [("mqar", "zoology"), ("running_parity", "zoology"), ("selective_copying", "mad"), ("even_pairs", "xlstm")],
)
def test_global_generators_stay_as_they_are(name: str, compat: str) -> None:
    task = create_task(name, noise=True) if name == "mqar" else create_task(name)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - that is the point
    task.sample(3, 1, length=None if compat != "zoology" else 64, compat=compat)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
