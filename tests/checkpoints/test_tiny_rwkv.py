"""Trained checkpoints of five versions (rwkv.cpp's test files): they load with no hint and reproduce their logits.

The bars, and the eps of the two oldest, are those of the README beside the files.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wkv
from tests.checkpoints.helpers import SHARED

FOLDER = SHARED / "tiny_rwkv"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/golden/tiny_rwkv is not beside the repository")

MODELS = {"4": "rwkv4", "5.1": "rwkv5_0", "5.2": "rwkv5", "6": "rwkv6", "7": "rwkv7"}
BINARIES = {"4": "4v0-660K-FP16", "5.2": "5v2-730K-FP16", "6": "6v0-3m-Q5_1", "7": "7v0-834K-FP16"}
PUBLISHED = {"4": "4v0-660K", "5.1": "5v1-730K", "5.2": "5v2-730K", "6": "6v0-3m", "7": "7v0-834K"}
PROMPT = torch.tensor([[34, 105, 110]])
# That project computes the group norm of v5 with this eps.
EPS = {"5.1": 1e-5, "5.2": 1e-5}


@functools.cache
def load(file: str, head_norm_eps: float | None = None):
    overrides = {} if head_norm_eps is None else {"head_norm_eps": head_norm_eps}
    return wkv.load_model(FOLDER / file, dtype=torch.float32, **overrides)


@functools.cache
def expected(version: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"tiny-rwkv-{version}.expected.safetensors")


@functools.cache
def run(version: str, file: str):
    with torch.no_grad():
        return load(file)(expected(version)["tokens"].reshape(1, -1).long())


def last_logits(version: str, file: str) -> float:
    """Largest difference to the published logits after the prompt, in float32."""
    published = np.fromfile(FOLDER / f"expected-logits-{PUBLISHED[version]}.bin", "<f4")
    with torch.no_grad():
        found = load(file, EPS.get(version))(PROMPT).logits[0, -1].numpy()
    return float(np.abs(found - published).max())


@pytest.mark.parametrize("version", MODELS)
def test_pth_logits(version: str) -> None:
    file = f"tiny-rwkv-{version}.pth"
    assert load(file).name == MODELS[version]
    assert (run(version, file).logits[0] - expected(version)["logits"]).abs().max() <= 1e-4


@pytest.mark.parametrize("version", MODELS)
def test_pth_states(version: str) -> None:
    """RWKV-4 keeps numerator and denominator relative to a running maximum that is free; the rest is compared as is."""
    golden = expected(version)
    state = run(version, f"tiny-rwkv-{version}.pth").state
    per_layer = 5 if version == "4" else 3
    for number, layer in enumerate(state.layers):
        stored = [golden[f"state.{per_layer * number + n:03d}"] for n in range(per_layer)]
        pairs = [(layer["att_shift"][0], stored[0]), (layer["ffn_shift"][0], stored[-1])]
        if version == "4":
            own = layer["num"][0] / layer["den"][0], layer["den"][0].log() + layer["max"][0]
            pairs += zip(own, (stored[1] / stored[2], stored[2].log() + stored[3]), strict=True)
        else:
            pairs.append((layer["wkv"][0], stored[1] if version == "7" else stored[1].mT))
        for found, wanted in pairs:
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("version", "bar"), [("4", 1e-5), ("5.1", 1e-5), ("5.2", 1e-5), ("6", 0.08), ("7", 1e-5)])
def test_pth_published_logits(version: str, bar: float) -> None:
    assert last_logits(version, f"tiny-rwkv-{version}.pth") <= bar


@pytest.mark.parametrize(("version", "bar"), [("4", 1.65e-3), ("5.2", 2.55e-3), ("6", 0.08), ("7", 1e-6)])
def test_bin_published_logits(version: str, bar: float) -> None:
    """The README's 1.6e-3 and 2.5e-3 are measured figures of two digits; these bars are their upper ends."""
    assert last_logits(version, f"tiny-rwkv-{BINARIES[version]}.bin") <= bar


@pytest.mark.parametrize("version", BINARIES)
def test_bin_and_pth_agree(version: str) -> None:
    """FP16 files to the rounding of fp16, the Q5_1 file exactly."""
    file = f"tiny-rwkv-{BINARIES[version]}.bin"
    binary, model = load(file), load(f"tiny-rwkv-{version}.pth")
    assert binary.name == MODELS[version]
    assert binary.config == model.config
    weights = binary.state_dict()
    for key, value in model.state_dict().items():
        assert (weights[key] - value).abs().max() <= (0 if version == "6" else 5e-4), key
    if version in ("6", "7"):
        assert (run(version, file).logits[0] - expected(version)["logits"]).abs().max() <= 1e-4
