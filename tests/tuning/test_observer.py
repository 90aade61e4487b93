"""A student whose initial state learns to follow a teacher."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import max_error
from tests.tuning.helpers import VOCABULARY, disturb, tiny, tokens
from wkv import create_model, tuning
from wkv.data import Batch
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.training import next_token_loss
from wkv.tuning.observer import Observer, ObserverWeights, divergence, observe

MODELS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a")


def larger(name: str, vocab_size: int = VOCABULARY) -> LanguageModel:
    """4 layers, 3 heads of 24."""
    torch.manual_seed(5)
    heads = {} if name == "rwkv4" else {"head_size": 24}
    model = create_model(name, vocab_size=vocab_size, hidden_size=72, num_layers=4, **heads)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim > 1:
                parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("other", ["rwkv4", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("own", MODELS)
def test_reading_in_segments_changes_nothing(own: str, other: str) -> None:
    student, teacher, x = tiny(own, dtype=torch.float64), larger(other).double(), tokens(2, 11)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, :5] = False  # a whole segment of padding
    found = Observer(student, teacher, stride=4).read(x, mask)
    for output, model in ((found.student, student), (found.teacher, teacher)):
        expected = model(x, mask=mask)
        assert max_error(output.logits[mask], expected.logits[mask]) < 1e-8
        for a, b in zip(output.state.layers, expected.state.layers, strict=True):
            assert all(max_error(a[slot], b[slot]) < 1e-8 for slot in b)
    assert found.distance.isfinite()


def test_a_model_that_follows_itself_is_where_it_should_be() -> None:
    model = tiny("rwkv7")
    observer = Observer(model, model, stride=5)
    x = tokens(2, 12)
    with torch.no_grad():
        _, losses = observer(Batch(x[:, :-1], x[:, 1:]), ObserverWeights())
    assert float(losses.state) < 1e-12
    assert abs(float(losses.logits)) < 1e-6
    expected = next_token_loss(model(x[:, :-1]).logits.detach(), x[:, 1:], l2wrap=0.0)
    assert float(losses.task) == pytest.approx(float(expected), abs=1e-5)


def test_layers_and_heads_are_paired_by_their_relative_place() -> None:
    observer = Observer(tiny("rwkv7"), larger("rwkv7"))
    assert observer.layers == [0, 2]
    state = larger("rwkv7")(tokens(2, 6)).state.detach()
    S = state.layers[2]["wkv"]  # 3 heads, for 2 of the student
    estimates = observer.estimates(state)
    assert torch.equal(estimates[1], S[:, [0, 1], :16, :16])
    with torch.no_grad():
        observer.values[1].mul_(2)
        observer.keys[1][1].mul_(3)
    assert torch.allclose(observer.estimates(state)[1], 2 * estimates[1] * torch.tensor([1.0, 3.0])[:, None, None])


@pytest.mark.parametrize("own", MODELS)
def test_only_the_state_and_the_projections_learn(own: str) -> None:
    student, teacher = tiny(own), larger("rwkv7")
    adapter = tuning.create("state", student)
    before = [(name, x.clone()) for model in (student, teacher) for name, x in model.state_dict().items()]
    observer = Observer(student, teacher, stride=6, correct=True)
    modes = [module.training for module in (*student.modules(), *teacher.modules())]
    history = observe(student, teacher, [tokens(2, 19, seed=i) for i in (1, 2)], steps=8, observer=observer)
    assert len(history) == 8
    for index in range(3):
        assert sum(h[index] for h in history[-4:]) < sum(h[index] for h in history[:4])
    after = [x for model in (student, teacher) for x in model.state_dict().values()]
    fixed = [name for (name, old), new in zip(before, after, strict=True) if torch.equal(old, new)]
    trained = {f"initial_state.{name}" for name in adapter.named_parameters()}
    assert trained.isdisjoint(fixed)
    assert len(fixed) + len(trained) == len(before)
    assert all(parameter.grad is None for parameter in (*student.parameters(), *teacher.parameters()))
    assert all(bool(gain.any()) for gain in observer.gains)
    assert [module.training for module in (*student.modules(), *teacher.modules())] == modes
    assert all("initial" not in name and "values" not in name for name in adapter.tensors())


@pytest.mark.parametrize("method", ["fullstate", "state-kernel"])
def test_other_state_adapters_learn_too(method: str) -> None:
    student = tiny("rwkv7")
    adapter = tuning.create(method, student)
    before = [parameter.detach().clone() for parameter in adapter.named_parameters().values()]
    observe(student, larger("rwkv6"), [tokens(2, 19)], steps=2)
    changed = [not torch.equal(a, b) for a, b in zip(before, adapter.named_parameters().values(), strict=True)]
    assert all(changed)


def test_parts_of_weight_zero_are_left_out() -> None:
    student, teacher = tiny("rwkv7"), larger("rwkv7", vocab_size=80)
    tuning.create("state", student)
    [losses] = observe(student, teacher, [tokens()], steps=1, weights=ObserverWeights(logits=0.0))
    assert losses.logits == 0
    assert losses.state > 0
    assert losses.task > 0
    with pytest.raises(WkvError, match="64 and 80 tokens"):
        observe(student, teacher, [tokens()], steps=1)


@pytest.mark.parametrize("name", ["rwkv4", "rwkv6", "rwkv7"])
def test_with_a_gain_of_one_the_state_is_the_estimate(name: str) -> None:
    student, teacher, x = tiny(name), larger(name), tokens(2, 9)
    disturb(tuning.create("state", student), size=0.5)
    observer = Observer(student, teacher, stride=3, correct=True)
    free = observer.read(x)
    with torch.no_grad():
        for gain in observer.gains:
            gain.fill_(1.0)
    held = observer.read(x)
    assert not torch.equal(free.student.logits[:, 3:], held.student.logits[:, 3:])
    assert torch.equal(free.student.logits[:, :3], held.student.logits[:, :3])
    estimates = observer.estimates(held.teacher.state)
    layer = held.student.state.layers[1]
    memory = layer["wkv"] if "wkv" in layer else (layer["num"] / layer["den"])[:, None, :, None]
    assert max_error(memory, estimates[1]) < 1e-5


def test_gains_reach_the_loss_only_where_states_are_corrected() -> None:
    student, teacher, x = tiny("rwkv7"), larger("rwkv7"), tokens(2, 13)
    tuning.create("state", student)
    for correct in (False, True):
        observer = Observer(student, teacher, stride=4, correct=correct)
        loss, _ = observer(Batch(x[:, :-1], x[:, 1:]), ObserverWeights())
        found = torch.autograd.grad(loss, list(observer.gains), allow_unused=True)
        assert all((gradient is not None) == correct for gradient in found)


def test_the_divergence_is_that_of_the_definition_and_counts_what_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    p, q = other.softmax(-1), own.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.allclose(divergence(own, other), each.mean(), atol=1e-6)
    assert torch.allclose(divergence(own, other, counted), each[counted].mean(), atol=1e-6)


def test_what_is_missing_is_said() -> None:
    student, teacher = tiny("rwkv7"), larger("rwkv7")
    with pytest.raises(WkvError, match="no active state adapter"):
        observe(student, teacher, [tokens()])
    tuning.create("state", student)
    with pytest.raises(WkvError, match="at least one batch"):
        observe(student, teacher, [])
    with pytest.raises(WkvError, match="of other models"):
        observe(student, teacher, [tokens()], observer=Observer(tiny("rwkv7"), teacher))
    with pytest.raises(WkvError, match="stride must be"):
        Observer(student, teacher, stride=0)
