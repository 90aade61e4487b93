"""Whatever does not fit gives one clear error before anything is generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wkv
from tests.inference.helpers import ScriptModel, tiny_model
from wkv.errors import WkvError
from wkv.inference import Sampler, generate
from wkv.inference.prompts import find_tokenizer
from wkv.tokenizers import ByteTokenizer, WorldTokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "a prompt is text, bytes or a list of token ids.*found None"),
        ({"prompt": 5}, "found 5"),
        ({"prompt": ["a", 5]}, "found 5"),
        ({"prompt": ["a", ["b"]]}, r"found \['b'\]"),
        ({"prompt": [1.5]}, "found 1.5"),
        ({"prompt": [1, 256]}, r"token id 256 of the prompt is outside the model's vocabulary \[0, 256\)"),
        ({"prompt": [[1], [-1]]}, "token id -1"),
        ({"prompt": ""}, "the prompt is empty and .* has no end-of-text id"),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"max_tokens": -1}, "max_tokens must be an integer of at least 0, found -1"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"logprobs": -1}, "logprobs must be"),
        ({"logprobs": "3"}, "logprobs must be"),
        ({"sampler": {"top_k": 3}}, "sampler must be a wkv.Sampler, found dict"),
        ({"seed": -3}, "seed must be"),
        ({"seed": "x"}, "seed must be"),
        ({"stop": [""]}, "a stop string must be a non-empty text"),
        ({"stop": ""}, "a stop string must be a non-empty text"),
        ({"stop": [3]}, "a stop string must be a non-empty text, found 3"),
        ({"stop": 3}, "stop must be a string or a list of strings"),
        ({"stop_ids": [256]}, r"stop id 256 is not an id of the model's vocabulary \[0, 256\)"),
        ({"stop_ids": ["a"]}, "stop id 'a'"),
        ({"stop_ids": 3}, "stop_ids must be a list"),
        ({"tokenizer": 7}, "tokenizer must be a wkv tokenizer, a name or a path, found int"),
        ({"tokenizer": "no such thing"}, "no tokenizer 'no such thing'"),
        ({"state": "state"}, "state must be a wkv.State"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_arguments(options: dict[str, Any], message: str, stream: bool) -> None:
    arguments: dict[str, Any] = {"prompt": "ok", "stream": stream, **options}
    with pytest.raises(WkvError, match=message):
        generate(tiny_model(), **arguments)


def test_states_that_do_not_fit() -> None:
    model = tiny_model()
    with pytest.raises(WkvError, match="holds 2 sequences, the tokens are a batch of 1"):
        generate(model, "a", state=model.init_state(2))
    with pytest.raises(WkvError, match="a carried state needs at least one new token"):
        generate(model, "", state=model.init_state(1))
    other = wkv.create_model("rwkv7", vocab_size=256, hidden_size=32, num_layers=3, head_size=16)
    with pytest.raises(WkvError, match="the state has 3 layers, expected 2"):
        generate(model, "a", state=other.init_state(1))


def test_the_tokenizer_is_found_or_asked_for() -> None:
    model: Any = ScriptModel(65536, [1], 1)
    assert isinstance(find_tokenizer(model), WorldTokenizer)
    assert isinstance(find_tokenizer(model, "bytes"), ByteTokenizer)
    model.config.vocab_size = 65530
    assert isinstance(find_tokenizer(model), WorldTokenizer)
    model.config.vocab_size = 256
    assert isinstance(find_tokenizer(model), ByteTokenizer)
    model.config.vocab_size = 5000
    with pytest.raises(WkvError, match="vocabulary of 5000; pass tokenizer="):
        generate(model, "a")
    model.tokenizer = own = ByteTokenizer()
    assert find_tokenizer(model) is own


def test_a_tokenizer_of_another_vocabulary() -> None:
    with pytest.raises(WkvError, match=r"is WorldTokenizer\(\) the tokenizer of this model"):
        generate(tiny_model(), "Hello", tokenizer="world")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    class Broken(ScriptModel):
        def forward_head(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = super().forward_head(hidden)
            logits[1, 3] = value if hidden[1, 0] == 3 else 0.0
            return logits

    model: Any = Broken(256, list(b"abcdef"), 1)
    with pytest.raises(WkvError, match="logits for prompt 1 are not finite after 2 new tokens"):
        generate(model, ["x", "y"], 5, Sampler(temperature=temperature))
