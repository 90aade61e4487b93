"""Kernel states of RWKV-7: what they leave alone, what they equal, and how they are stored."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wkv
from tests.ops.helpers import max_error
from tests.training.helpers import recipe_values, write_corpus
from tests.tuning.helpers import disturb, tiny, tokens
from wkv import create_model, save_model, tuning
from wkv.data import Batch
from wkv.data.sampling import RowSampler
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.layers.timeline import Timeline
from wkv.ops import use_backend, wkv7
from wkv.training import next_token_loss, parse_recipe, resume_recipe
from wkv.training import train as train_run
from wkv.tuning.kernel_features import KernelFeatures, kmeans, removal_directions, unit_vectors
from wkv.tuning.kernel_state import KernelStateAdapter

MODELS = ("rwkv7", "rwkv7a")
PLAIN = {"support": "identity", "kernel": "linear"}
FAST = {"rate": 0.05, "kappa": 0.1, "sample": 1.0}
BATCHES = [tokens(4, 30, seed=5)]
FORMS: list[dict[str, Any]] = [
    {},
    {"support": "kmeans", "batches": BATCHES, "size": 24},
    {"kernel": "linear", "size": 40},
    {"centre": False},
    {"dbp": True},
    PLAIN,
    {**PLAIN, "dbp": FAST},
]


def brief(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={'...' if key == 'batches' else value}" for key, value in options.items()) or "default"


def create(model: LanguageModel, **options: Any) -> KernelStateAdapter:
    with warnings.catch_warnings():
        if options.get("mode") == "replace":
            warnings.simplefilter("ignore")
        adapter = tuning.create("state-kernel", model, **options)
    assert isinstance(adapter, KernelStateAdapter)
    return adapter


def logits(model: LanguageModel, x: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **more).logits


def value(adapter: KernelStateAdapter, seed: int) -> list[Tensor]:
    """Random S~_0 of all layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [parameter.shape for parameter in adapter.named_parameters().values()]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def put(adapter: KernelStateAdapter, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, new in zip(adapter.named_parameters().values(), values, strict=True):
            parameter.copy_(new)


# ---- sheet C.2 (i) to (v) ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FORMS, ids=brief)
@pytest.mark.parametrize("name", MODELS)
def test_a_new_one_changes_nothing(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny(name, dtype=dtype)
    x = tokens()
    before = logits(model, x)
    create(model, **options)
    assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_with_identity_and_linear_kernel_it_is_plain_state_tuning(name: str, mode: str) -> None:
    model, x = tiny(name, dtype=torch.float64), tokens()
    past = model(tokens(1, 7, seed=8)).state.detach()
    adapter = create(model, mode=mode, init=past, **PLAIN)
    values = value(adapter, 1)
    put(adapter, values)
    found = logits(model, x)
    adapter.remove()
    start = past.select([0, 0])
    for layer, added in zip(start.layers, values, strict=True):
        layer["wkv"] = (layer["wkv"] if mode == "residual" else 0 * layer["wkv"]) + added
    assert max_error(found, logits(model, x, state=start)) < 1e-12


def test_outputs_are_affine_in_what_is_trained() -> None:
    adapter = create(tiny("rwkv7", dtype=torch.float64))
    memory: Any = adapter.states.layers[0]
    inputs = random_inputs(8, torch.float64)
    state = [torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2)]

    def out(kernel: Tensor) -> Tensor:
        found: Tensor = memory.read(inputs[3], inputs, {"kernel": kernel}, Timeline())[0]
        return found

    middle = out(0.3 * state[0] + 0.7 * state[1])
    assert max_error(0.3 * out(state[0]) + 0.7 * out(state[1]), middle) < 1e-12
    assert torch.equal(out(torch.zeros_like(state[0])), inputs[3])


def random_inputs(length: int, dtype: torch.dtype, size: int = 16, seed: int = 4) -> tuple[Tensor, ...]:
    """r, log_w, k, v, kk, iclr as RWKV-7 makes them, [2, T, 2, N]."""
    generator = torch.Generator().manual_seed(seed)
    r, k, v, kk = (torch.randn(2, length, 2, size, generator=generator, dtype=dtype) for _ in range(4))
    share, iclr = (torch.randn(2, length, 2, size, generator=generator, dtype=dtype).mul(3).sigmoid() for _ in "ab")
    return r, -0.6065 * share, k, v, torch.nn.functional.normalize(kk, dim=-1), iclr


@pytest.mark.parametrize("options", [{"size": 18}, {"size": 18, "dbp": True}], ids=brief)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    model = tiny("rwkv7", dtype=torch.float64)
    adapter, x = create(model, **options), tokens(2, 9)
    disturb(adapter, size=0.3)
    parameters = list(adapter.named_parameters().values())

    def loss() -> Tensor:
        return next_token_loss(model(x[:, :-1]).logits, x[:, 1:], l2wrap=0.0)

    model.eval()
    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(parameters, directions, strict=True):
                parameter.add_(d, alpha=sign * 1e-5)
            sides.append(float(loss()))
            for parameter, d in zip(parameters, directions, strict=True):
                parameter.sub_(d, alpha=sign * 1e-5)
    assert all(float(g.abs().max()) > 0 for g in gradients)
    assert abs((sides[0] - sides[1]) / 2e-5 - expected) < 1e-6 * abs(expected) + 1e-9


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_memory_cannot_grow(kernel: str, centred: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    support = unit_vectors(2, 40, 16, generator)
    features = KernelFeatures(support, unit_vectors(2, 500, 16, generator) if centred else None, kernel, 4.0).double()
    inputs = random_inputs(200, torch.float64)
    inputs[5][:, ::7] = 1 - 1e-9  # all of it is removed, or nothing forgotten
    inputs[1][:, ::5] = -1e-9
    _, log_w, k, v, a, b = features.residual(inputs)
    assert not k.any()
    assert not v.any()
    A = torch.diag_embed(log_w.exp()) + a[..., :, None] * b[..., None, :]
    assert float(torch.linalg.eigvals(A).abs().max()) <= 1 + 1e-6


# ---- one memory, however it is read ----


@pytest.mark.parametrize("options", [{}, {"dbp": True}, {"mode": "replace", "sharpness": 1.0}, PLAIN], ids=brief)
def test_it_is_the_same_in_pieces_step_by_step_padded_and_in_every_backend(options: dict[str, Any]) -> None:
    model, x = tiny("rwkv7", dtype=torch.float64), tokens(2, 15)
    disturb(create(model, **options), size=0.5)
    model.eval()
    with torch.no_grad():
        expected, final = model(x)
        for pieces in (1, 4):
            state, found = None, []
            for part in x.split(pieces, 1):
                part_logits, state = model(part, state)
                found.append(part_logits)
            assert max_error(torch.cat(found, 1), expected) < 1e-10
            for a, b in zip(state.layers, final.layers, strict=True):
                assert a.keys() == b.keys()
                assert all(max_error(a[slot], b[slot]) < 1e-10 for slot in b)
        mask = torch.ones(2, 19, dtype=torch.bool)
        mask[:, [0, 3, 9, 18]] = False
        padded = torch.zeros(2, 19, dtype=torch.long)
        padded[mask] = x.flatten()
        found_logits, found_state = model(padded, mask=mask)
        assert max_error(found_logits[mask], expected.flatten(0, 1)) < 1e-10
        assert max_error(found_state.layers[1]["kernel"], final.layers[1]["kernel"]) < 1e-10
        for backend in ("reference", "chunked"):
            with use_backend(backend):
                assert max_error(model(x).logits, expected) < 1e-10


def test_a_reset_empties_the_memory_and_the_model_refuses_it() -> None:
    model, x = tiny("rwkv7", dtype=torch.float64), tokens(2, 12)
    adapter = create(model)
    reset = torch.zeros_like(x, dtype=torch.bool)
    reset[:, 5] = True
    memory: Any = adapter.states.layers[0]
    inputs = random_inputs(12, torch.float64)
    found, slot = memory.read(inputs[3], inputs, {"kernel": torch.ones(2, 2, 32, 32).double()}, Timeline(reset=reset))
    assert bool((found != inputs[3])[:, :5].any(-1).all())
    assert torch.equal(found[:, 5:], inputs[3][:, 5:])
    assert not slot["kernel"].any()
    with pytest.raises(WkvError, match="reset empties the state"):
        model(x, reset=reset)


def test_generation_starts_from_it() -> None:
    model = tiny("rwkv7")
    disturb(create(model), size=1.0)
    found = wkv.generate(model, [1, 2, 3], 8, wkv.Sampler(temperature=0), tokenizer="bytes", stop_ids=())
    ids = [1, 2, 3]
    for _ in range(8):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    assert found.tokens == ids[3:]


# ---- decorrelation ----


def train(adapter: tuning.Adapter, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(adapter.named_parameters().values(), lr=1.0)
    x = tokens(4, 20, seed=9)
    adapter.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(adapter.model(x[:, :-1]).logits, x[:, 1:], l2wrap=0.0).backward()
        optimizer.step()
    adapter.model.eval()


@pytest.mark.parametrize("options", [{}, PLAIN], ids=brief)
def test_with_r_frozen_it_is_training_without(options: dict[str, Any]) -> None:
    plain, decorrelated = tiny("rwkv7", dtype=torch.float64), tiny("rwkv7", dtype=torch.float64)
    train(create(plain, **options))
    adapter = create(decorrelated, **options, dbp={**FAST, "rate": 0.0})
    train(adapter)
    assert max_error(logits(decorrelated, tokens()), logits(plain, tokens())) < 1e-10
    assert adapter.decorrelation_loss() is not None


def test_folding_changes_nothing_but_what_it_costs() -> None:
    model = tiny("rwkv7", dtype=torch.float64)
    adapter, x = create(model, dbp=FAST), tokens()
    train(adapter, 5)
    memory: Any = adapter.states.layers[0]
    off = memory.start.decorrelation - torch.eye(32)
    assert float(off.abs().max()) > 1e-4
    before = logits(model, x)
    adapter.fold()
    assert adapter.options["dbp"] is False
    assert max_error(logits(model, x), before) < 1e-12
    assert [name.rsplit(".")[-1] for name in adapter.named_parameters()] == ["value"] * 2
    assert all(parameter.requires_grad for parameter in adapter.named_parameters().values())


def test_a_run_that_was_cut_off_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=2, head_size=16)
    with torch.no_grad():
        base.head.weight.normal_()
        for block in base.blocks:
            block.att.output.weight.normal_(std=0.2)
    save_model(base, tmp_path / "m.safetensors")
    create(base, dbp=FAST).save(tmp_path / "a.safetensors")
    values = recipe_values(write_corpus(tmp_path / "texts"), steps=6, warmup_steps=1, checkpoint_every=2)
    values["train"]["start_from"] = str(tmp_path / "m.safetensors")
    values["data"]["order"] = "padded"
    recipe = parse_recipe({**values, "model": {}, "tuning": {"adapter": str(tmp_path / "a.safetensors")}})
    train_run(recipe, tmp_path / "whole")
    draw, drawn = RowSampler.next_batch, iter([True] * 5)
    with monkeypatch.context() as patch:
        patch.setattr(RowSampler, "next_batch", lambda self: draw(self) if next(drawn) else None)
        with pytest.raises(StopIteration):
            train_run(recipe, tmp_path / "cut")
    train_run(resume_recipe(tmp_path / "cut"), tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / run / "adapter.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert float((whole["layers.0.start.decorrelation"] - torch.eye(32)).abs().max()) > 1e-3


def test_what_r_sees_is_what_the_state_is_multiplied_with() -> None:
    model = tiny("rwkv7", dtype=torch.float64)
    adapter = create(model, **PLAIN, dbp={**FAST, "rate": 0.0})
    seen: list[Tensor] = []
    memory: Any = adapter.states.layers[0]
    memory.start.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    recorded: list[tuple[Tensor, ...]] = []
    read = model.blocks[0].att.side_memory
    model.blocks[0].att.side_memory = lambda y, inputs, *rest: recorded.append(inputs) or read(y, inputs, *rest)
    logits(model, tokens())
    r, log_w, _, _, kk, iclr = recorded[0]
    zero, identity = torch.zeros_like(r), torch.eye(16).double().expand(2, 2, 16, 16)
    assert max_error(seen[0], wkv7(r, log_w, zero, zero, -kk, iclr * kk, identity)[0]) < 1e-12


# ---- support vectors and features ----


def test_cluster_centres_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.eye(4)[:3]
    vectors = centres.repeat(50, 1) + 0.1 * torch.randn(150, 4, generator=generator)
    found = kmeans(vectors.expand(2, -1, -1), 3, torch.Generator().manual_seed(3))
    order = found[0].argmax(-1).argsort()
    assert float((found[0][order] - centres).abs().max()) < 0.1
    assert torch.equal(found[0], found[1])


def test_removal_directions_are_those_of_the_real_tokens() -> None:
    model, x = tiny("rwkv7"), tokens(2, 10)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :4] = False
    short = removal_directions(model, [x[:1, 4:]], torch.Generator())
    both = removal_directions(model, [Batch(x, x, mask=mask)], torch.Generator())
    assert [d.shape for d in both] == [(2, 16, 16)] * 2
    assert torch.allclose(both[0].norm(dim=-1), torch.ones(2, 16), atol=1e-5)
    distances = torch.cdist(short[1], both[1]).amin(-1)
    assert float(distances.max()) < 1e-4
    assert all(block.att.side_memory is None for block in model.blocks)


def test_centring_makes_features_of_different_keys_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    support, data = unit_vectors(1, 128, 64, generator), unit_vectors(1, 1000, 64, generator)
    keys = unit_vectors(1, 50, 64, generator).transpose(0, 1)[None].transpose(1, 2).reshape(1, 50, 1, 64)
    pairs = torch.triu_indices(50, 50, 1)
    means = []
    for directions in (None, data):
        found = KernelFeatures(support, directions, "gaussian", 4.0).directions(keys)[0, :, 0]
        means.append(float((found @ found.mT)[pairs[0], pairs[1]].mean()))
    assert means[0] > 0.9
    assert abs(means[1]) < 0.05


@pytest.mark.parametrize("support", ["random", "kmeans"])
def test_the_readout_has_orthonormal_rows(support: str) -> None:
    adapter = create(tiny("rwkv7"), support=support, batches=BATCHES)
    memory: Any = adapter.states.layers[1]
    readout = memory.features.readout
    assert readout.shape == (2, 16, 32)
    assert torch.allclose(readout @ readout.mT, torch.eye(16).expand(2, 16, 16), atol=1e-5)


# ---- as an adapter ----


@pytest.mark.parametrize("options", [*FORMS, {"mode": "replace"}], ids=brief)
def test_it_comes_back_from_its_file(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = tiny("rwkv7"), tokens()
    past = model(tokens(1, 5)).state.detach()
    adapter = create(model, init=past, **options)
    disturb(adapter, size=0.5)
    train(adapter, 2)
    adapter.save(tmp_path / "a.safetensors")
    expected = logits(model, x)
    fresh = tiny("rwkv7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tuning.load(tmp_path / "a.safetensors", fresh)
    assert torch.equal(logits(fresh, x), expected)
    assert loaded.options == adapter.options
    for a in (adapter, loaded):
        train(a, 2)
    assert max_error(logits(fresh, x), logits(model, x)) < 1e-5


def test_only_its_own_parameters_learn() -> None:
    model = tiny("rwkv7")
    adapter = create(model)
    disturb(adapter)
    model(tokens()).logits.square().sum().backward()
    own = {id(parameter) for parameter in adapter.named_parameters().values()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name
    assert adapter.num_parameters == 2 * 2 * 32 * 32


def test_activating_deactivating_and_removing() -> None:
    model, x = tiny("rwkv7"), tokens()
    plain = logits(model, x)
    adapter = create(model)
    disturb(adapter, size=1.0)
    tuned = logits(model, x)
    assert max_error(tuned, plain) > 1e-2
    assert "kernel" in model.init_state(1).layers[0]
    with tuning.using(model):
        assert torch.equal(logits(model, x), plain)
        assert "kernel" not in model.init_state(1).layers[0]
    assert torch.equal(logits(model, x), tuned)
    other = tuning.create("state", model, name="plain")
    assert torch.equal(logits(model, x), plain)
    other.remove()
    adapter.activate()
    assert torch.equal(logits(copy.deepcopy(model), x), tuned)
    adapter.remove()
    assert torch.equal(logits(model, x), plain)
    assert all(block.att.side_memory is None for block in model.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, {**PLAIN, "dbp": FAST}], ids=brief)
def test_where_it_is_a_plain_state_it_merges(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("rwkv7", dtype=dtype)
    adapter = create(model, **options)
    disturb(adapter, size=0.5)
    assert adapter.mergeable
    assert adapter.verify() <= (1e-5 if dtype == torch.float32 else 5e-2)
    adapter.merge()
    assert model.tuned_state is not None
    assert model.tuned_state.layers[0].keys() == {"att_shift", "wkv", "ffn_shift"}
    wkv.save_model(model, tmp_path / "m.safetensors")
    again = wkv.load_model(tmp_path / "m.safetensors")
    assert torch.equal(again.tuned_state.layers[1]["wkv"], model.tuned_state.layers[1]["wkv"])
    adapter.unmerge()
    assert model.tuned_state is None


def test_else_it_cannot_be_merged_and_verify_says_so() -> None:
    model = tiny("rwkv7")
    adapter = create(model)
    disturb(adapter)
    expected = logits(model, tokens())
    assert not adapter.mergeable
    for call in (adapter.merge, adapter.verify):
        with pytest.raises(WkvError, match="cannot be merged"):
            call()
    assert not adapter.is_merged
    assert torch.equal(logits(model, tokens()), expected)


def test_parameters_stay_float32_in_a_half_precision_model() -> None:
    model = tiny("rwkv7")
    adapter = create(model, dbp=True)
    model.bfloat16()
    assert all(tensor.dtype == torch.float32 for tensor in adapter.tensors().values())
    assert logits(model, tokens()).dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny("rwkv7")
        adapter = create(model, dbp=FAST)
        disturb(adapter)
        model.gradient_checkpointing = checkpointing
        loss = model(tokens()).logits.square().sum()
        found.append(torch.autograd.grad(loss, list(adapter.named_parameters().values())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "at least 16"),
        ({"size": 32, "support": "identity"}, "size must be 16"),
        ({"size": 2.5}, "positive integer"),
        ({"mode": "both"}, "mode 'both' is unknown"),
        ({"support": "grid"}, "support 'grid' is unknown"),
        ({"kernel": "cosine"}, "kernel 'cosine' is unknown"),
        ({"sharpness": 0}, "sharpness must be"),
        ({"support": "kmeans"}, "give batches"),
        ({"support": "kmeans", "batches": []}, "no tokens"),
        ({"support": "kmeans", "batches": [tokens(1, 5)]}, "give more batches"),
        ({"mode": "replace", "dbp": True}, 'dbp is for mode "residual"'),
        ({"mode": "replace", "kernel": "linear"}, "decay must stay positive"),
        ({"dbp": {"speed": 1}}, "no option 'speed'"),
        ({"dbp": 3}, "dbp is True, False or a mapping"),
        ({"points": 3}, "no option 'points'"),
    ],
    ids=lambda value: brief(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny("rwkv7")
    with pytest.raises(WkvError, match=re.escape(message)):
        create(model, **options)
    assert not model.adapters
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6"])
def test_it_is_for_rwkv7_only(name: str) -> None:
    with pytest.raises(WkvError, match="for RWKV-7 and RWKV-7a, found rwkv"):
        create(tiny(name))


def test_a_tuned_state_is_not_dropped_silently() -> None:
    model = tiny("rwkv7")
    model.tuned_state = model(tokens(1, 4)).state.detach()
    with pytest.raises(WkvError, match=r"init=model\.tuned_state"):
        create(model)
    kept = model.tuned_state
    expected = logits(model, tokens(1), state=kept)
    adapter = create(model, init=kept)
    assert torch.equal(logits(model, tokens(1)), expected)
    adapter.remove()
    assert model.tuned_state is kept


def test_the_literal_form_warns() -> None:
    with pytest.warns(UserWarning, match="residual"):
        tuning.create("state-kernel", tiny("rwkv7"), mode="replace")
