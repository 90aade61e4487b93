"""Guidance for one prompt: it works, and leaves no trace on the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import wkv
from tests.inference.helpers import PieceTokenizer
from tests.tuning.helpers import disturb, tiny
from wkv import Sampler, tuning
from wkv.errors import WkvError
from wkv.inference.generate import starting_state
from wkv.inference.prompts import find_tokenizer
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.training import next_token_loss
from wkv.tuning.guidance import Guidance, GuidedState, guided_generate, mean_log_probabilities, normalised

MODELS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a")
PROMPT = [3, 1, 4, 1, 5]
GREEDY = Sampler(temperature=0)


def model_of(name: str, seed: int = 0) -> LanguageModel:
    model = tiny(name, seed)
    model.tokenizer = "bytes"
    return model


def loss(model: LanguageModel, state: State | None, trace: list[int]) -> float:
    """Cross-entropy of a trace behind the prompt."""
    line = torch.tensor([PROMPT + trace])
    counted = torch.arange(line.shape[1] - 1)[None] >= len(PROMPT) - 1
    with torch.no_grad():
        return float(next_token_loss(model(line[:, :-1], state).logits, line[:, 1:], counted))


def states(guidance: Guidance, model: LanguageModel, state: State | None = None) -> State:
    return guidance.states(model, [PROMPT], starting_state(model, state, 1), find_tokenizer(model))


def everything(model: LanguageModel) -> dict[str, Any]:
    """All that a model is."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "learns": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "states": (id(model.tuned_state), id(model.initial_state)),
        "adapters": (dict(model.adapters), dict(model.active_adapters)),
        "tuned": None if model.tuned_state is None else copy.deepcopy(model.tuned_state.layers),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("match", ["trace", "logits"])
@pytest.mark.parametrize("name", MODELS)
def test_the_student_moves_towards_the_teacher(name: str, match: str) -> None:
    model, teacher = model_of(name), model_of("rwkv7", seed=7)
    guidance = Guidance(teacher, steps=6, learning_rate=0.1, match=match, trace_tokens=12, sampler=GREEDY)
    trace = wkv.generate(teacher, PROMPT, 12, GREEDY).tokens
    guided = states(guidance, model)
    assert loss(model, guided, trace) < loss(model, None, trace) - 0.05
    shifts = [value for layer in guided.layers for slot, value in layer.items() if slot.endswith("shift")]
    assert not any(bool(value.any()) for value in shifts)


def test_the_steps_are_those_of_adam() -> None:
    model, teacher = model_of("rwkv7"), model_of("rwkv6", seed=7)
    trace = wkv.generate(teacher, PROMPT, 10, seed=5).tokens
    guided = states(Guidance(teacher, steps=3, learning_rate=0.05, trace_tokens=10, seed=5, clip=1e9), model)
    adapter = tuning.create("state", model)
    optimizer = torch.optim.Adam(adapter.named_parameters().values(), 0.05)
    line = torch.tensor([PROMPT + trace])
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(line[:, :-1]).logits[:, len(PROMPT) - 1 :]
        torch.nn.functional.cross_entropy(logits[0], line[0, len(PROMPT) :]).backward()
        optimizer.step()
    expected = model.init_state(1)
    for a, b in zip(guided.layers, expected.layers, strict=True):
        assert all(torch.allclose(a[slot], b[slot], atol=1e-5) for slot in b)


def explode(text: str) -> float:
    raise RuntimeError("no reward today")


@pytest.mark.parametrize("kind", ["plain", "tuned", "adapter", "kernel"])
@pytest.mark.parametrize("how", ["trace", "logits", "reward", "error"])
def test_nothing_of_the_model_changes(kind: str, how: str) -> None:
    model, teacher = model_of("rwkv7"), model_of("rwkv7", seed=7)
    if kind == "tuned":
        model.tuned_state = model(torch.tensor([[9, 8, 7]])).state.detach()
    elif kind != "plain":
        disturb(tuning.create("state" if kind == "adapter" else "state-kernel", model), size=0.3)
    model.train()
    model.blocks[0].eval()
    guidance: dict[str, Callable[[], Guidance]] = {
        "trace": lambda: Guidance(teacher, steps=2, trace_tokens=6),
        "logits": lambda: Guidance(teacher, steps=2, trace_tokens=6, match="logits", method="fullstate"),
        "reward": lambda: Guidance(reward=lambda text: float(text.count("a")), steps=2, trace_tokens=6),
        "error": lambda: Guidance(reward=explode, trace_tokens=6),
    }
    before = everything(model), everything(teacher)
    answer = wkv.generate(model, PROMPT, 8, GREEDY)
    if how == "error":
        with pytest.raises(RuntimeError, match="no reward today"):
            guided_generate(model, PROMPT, guidance[how](), 8, GREEDY)
    else:
        guided_generate(model, PROMPT, guidance[how](), 8, GREEDY)
    assert same(before, (everything(model), everything(teacher)))
    again = wkv.generate(model, PROMPT, 8, GREEDY)
    assert again.logprobs == answer.logprobs
    assert answer.state is not None
    assert again.state is not None
    assert same(again.state.layers, answer.state.layers)


@pytest.mark.parametrize("kind", ["tuned", "adapter", "kernel", "given"])
def test_it_begins_where_the_model_begins(kind: str) -> None:
    model, teacher = model_of("rwkv7"), model_of("rwkv7", seed=7)
    given = None
    if kind == "tuned":
        model.tuned_state = model(torch.tensor([[9, 8, 7]])).state.detach()
    elif kind == "given":
        given = model(torch.tensor([[9, 8, 7]])).state.detach()
    else:
        disturb(tuning.create("state" if kind == "adapter" else "state-kernel", model), size=0.3)
    start = starting_state(model, given, 1) or model.init_state(1).detach()
    rate = 1e-3
    guided = states(Guidance(teacher, steps=1, learning_rate=rate, trace_tokens=6), model, given)
    for a, b in zip(guided.layers, start.layers, strict=True):
        assert a.keys() == b.keys()
        for slot in b:
            moved = (a[slot] - b[slot]).abs()
            assert float(moved.max()) < 1.1 * rate if slot == "wkv" else not moved.any()
        assert bool((a["wkv"] != b["wkv"]).any())


def test_every_prompt_has_a_state_of_its_own() -> None:
    model, teacher = model_of("rwkv7"), model_of("rwkv7", seed=7)
    guidance = Guidance(teacher, steps=2, learning_rate=0.1, trace_tokens=6)
    prompts = [PROMPT, [7, 7], [1]]
    together = guided_generate(model, prompts, guidance, 6, GREEDY)
    alone = [guided_generate(model, prompt, guidance, 6, GREEDY) for prompt in prompts]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    pieces = guided_generate(model, PROMPT, guidance, 6, GREEDY, stream=True)
    assert "".join(pieces) == alone[0].text


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_may_be_called_where_gradients_are_off(context: Any) -> None:
    model, teacher = model_of("rwkv7"), model_of("rwkv7", seed=7)
    guidance = Guidance(teacher, steps=2, trace_tokens=6)
    expected = guided_generate(model, PROMPT, guidance, 6, GREEDY)
    with context():
        assert guided_generate(model, PROMPT, guidance, 6, GREEDY).tokens == expected.tokens


def other_teacher() -> LanguageModel:
    torch.manual_seed(3)
    teacher = wkv.create_model("rwkv6", vocab_size=259, hidden_size=32, num_layers=1, head_size=16)
    teacher.tokenizer = PieceTokenizer("the", "and")
    return teacher


def byte_model() -> LanguageModel:
    torch.manual_seed(4)
    model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=2, head_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim > 1:
                parameter.normal_(std=0.2)
    return model


def test_a_trace_goes_from_one_tokenizer_to_another() -> None:
    model, teacher = byte_model(), other_teacher()
    guidance = Guidance(teacher, steps=6, learning_rate=0.1, trace_tokens=10, seed=2)
    written = wkv.generate(teacher, "hello", 10, seed=2).tokens
    ids = [ord(letter) for letter in "hello"]
    line = torch.tensor([ids + list(teacher.tokenizer.decode_bytes(written))])
    guided = guidance.states(model, [ids], None, find_tokenizer(model))
    with torch.no_grad():
        before, after = (
            float(next_token_loss(model(line[:, :-1], state).logits[:, 4:], line[:, 5:].contiguous()))
            for state in (None, guided)
        )
    assert after < before - 0.05
    with pytest.raises(WkvError, match="another tokenizer"):
        guided_generate(model, "hello", Guidance(teacher, match="logits"))


def test_a_teacher_that_writes_nothing_teaches_nothing() -> None:
    model, teacher = byte_model(), other_teacher()
    with torch.no_grad():
        teacher.head.weight.zero_()
        teacher.ln_out.bias.fill_(1.0)
        teacher.head.weight[teacher.tokenizer.eos_id] = 10.0
    found = guided_generate(model, "hello", Guidance(teacher, sampler=GREEDY), 6, GREEDY)
    assert found.tokens == wkv.generate(model, "hello", 6, GREEDY).tokens


def likely(model: LanguageModel, state: State) -> torch.Tensor:
    """How likely the next byte is a good one."""
    return model(torch.tensor([PROMPT]), state).logits[0, -1].softmax(-1)[:64].sum()


def good(text: str) -> float:
    return float(sum(letter < "\x40" for letter in text))


def test_steps_follow_the_gradient_of_the_expected_reward() -> None:
    model = byte_model()
    start = model.init_state(1)
    state = GuidedState(model, start, "state")
    guidance = Guidance(reward=good, steps=1, trace_tokens=1, group=500)
    [loss] = guidance._rewarded(model, PROMPT, state, find_tokenizer(model))
    assert loss is not None
    exact, found = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, state.parameters)])
        for value in (-likely(model, state.expanded(1)), loss)
    )
    assert float(torch.cosine_similarity(exact, found, 0)) > 0.9


def test_rewards_are_earned() -> None:
    model = byte_model()
    guidance = Guidance(reward=good, steps=10, learning_rate=0.1, trace_tokens=1, group=64)
    with torch.no_grad():
        assert likely(model, states(guidance, model)) > likely(model, model.init_state(1)) + 0.08


def test_equal_rewards_change_nothing() -> None:
    model = model_of("rwkv7")
    start = model.init_state(1).detach()
    guided = states(Guidance(reward=lambda text: 3.0, trace_tokens=4), model)
    assert same([dict(layer) for layer in guided.layers], [dict(layer) for layer in start.layers])


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_the_text_was_drawn_with(name: str) -> None:
    model = model_of(name)
    state = GuidedState(model, model.init_state(1), "state")
    found = wkv.generate(model, [PROMPT] * 3, 7, seed=1, stop_ids=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    written = [each.tokens or [11] for each in found]
    log_p = mean_log_probabilities(model, PROMPT, written, state)
    for each, mean in zip(found, log_p.tolist(), strict=True):
        if each.tokens:
            assert mean == pytest.approx(sum(each.logprobs) / len(each.logprobs), abs=1e-4)


def test_rewards_are_normalised_within_the_group() -> None:
    found = normalised([1.0, 2.0, 3.0, 6.0])
    assert sum(found) == pytest.approx(0)
    assert math.sqrt(sum(x * x for x in found) / 4) == pytest.approx(1)
    assert normalised([2.0, 2.0]) == [0.0, 0.0]
    with pytest.raises(WkvError, match="finite"):
        normalised([1.0, math.nan])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither"),
        ({"teacher": "model", "reward": len}, "both"),
        ({"teacher": "rwkv7"}, "a language model of this library, found str"),
        ({"reward": 3}, "reward must be a function"),
        ({"reward": len, "steps": 0}, "steps must be a positive integer"),
        ({"reward": len, "group": 1}, "group must be at least 2"),
        ({"reward": len, "match": "words"}, "match 'words' is unknown"),
        ({"reward": len, "method": "weights"}, "method 'weights' is unknown"),
        ({"reward": len, "learning_rate": 0}, "learning_rate must be a positive number"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        Guidance(**options)
