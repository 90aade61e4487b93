"""Contenders from text, and what a benchmark changes around their mixers."""

from __future__ import annotations

import copy

import pytest
import torch

from wkv.errors import WkvError
from wkv.evaluation.synthetic.contenders import (
    Contender,
    Frame,
    NoChannelMix,
    remove_channel_mix,
    split_contenders,
    state_bytes,
    tie_head,
)

from .helpers import tiny

MODELS = ("rwkv4", "rwkv6", "rwkv7", "transformer")


def test_contenders_from_text() -> None:
    assert Contender.parse("rwkv7") == Contender("rwkv7", {}, "rwkv7")
    found = Contender.parse("rwkv7:head_size=16,norm_eps=1e-6,label=ours (small)")
    assert found == Contender("rwkv7", {"head_size": 16, "norm_eps": 1e-6}, "ours (small)")
    assert Contender.parse("rwkv7:head_size=16,decay_rank=none").label == "rwkv7 head_size=16, decay_rank=None"


def test_a_list_of_contenders_tells_options_from_names() -> None:
    found = split_contenders("rwkv4, rwkv7:head_size=16,num_layers=1,rwkv7:label=b,transformer:tied_head=true")
    assert [contender.model for contender in found] == ["rwkv4", "rwkv7", "rwkv7", "transformer"]
    assert [dict(contender.options) for contender in found] == [
        {}, {"head_size": 16, "num_layers": 1}, {}, {"tied_head": True},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a list of different ones"),
        ("rwkv4,rwkv4", "a list of different ones"),
        ("gpt5", "model 'gpt5' is unknown"),
        ("rwkv7:depth=3", "rwkv7 has no option 'depth'; one of .*head_size.*, label"),
        ("rwkv7:vocab_size=3", "rwkv7 has no option 'vocab_size'"),
        ("rwkv7:head_size", "expected NAME:OPTION=VALUE"),
        ("rwkv7:head_size=", "expected NAME:OPTION=VALUE"),
    ],
)
def test_text_that_is_wrong(text: str, message: str) -> None:
    with pytest.raises(WkvError, match=message):
        split_contenders(text)


def test_sizes_are_filled_in_where_a_model_has_them() -> None:
    sizes = {"hidden_size": 16, "num_layers": 1, "head_size": 8}
    assert Contender.parse("rwkv4").build(5, sizes).config.hidden_size == 16
    assert Contender.parse("rwkv7:hidden_size=24").build(5, sizes).config.num_heads == 3
    with pytest.raises(WkvError, match="not a multiple of head_size"):
        Contender.parse("rwkv7:head_size=7").all_options(5, sizes)


@pytest.mark.parametrize("name", MODELS)
def test_without_channel_mix_the_blocks_are_mixers_alone(name: str) -> None:
    """The same as a channel mix that adds nothing; reading in two parts is exact still."""
    model = tiny(name)
    for block in model.blocks:
        torch.nn.init.normal_(block.att.output.weight)
    silent = copy.deepcopy(model)
    for block in silent.blocks:
        last = block.ffn.down if name == "transformer" else block.ffn.value
        torch.nn.init.zeros_(last.weight)
    remove_channel_mix(model)
    assert all(isinstance(block.ffn, NoChannelMix) for block in model.blocks)
    assert model.num_parameters < silent.num_parameters
    tokens = torch.randint(8, (3, 10))
    whole = model(tokens)
    torch.testing.assert_close(whole.logits, silent(tokens).logits, atol=1e-6, rtol=0)
    first = model(tokens[:, :4])
    rest = model(tokens[:, 4:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, atol=1e-5, rtol=0)
    whole.logits.sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_head_is_the_embedding(name: str) -> None:
    model, before = tiny(name), tiny(name).num_parameters
    tie_head(model)
    assert before - model.num_parameters == 8 * 16
    assert 0.01 < model.emb.weight.std() < 0.03
    hidden, _ = model.forward_features(torch.randint(8, (2, 5)))
    torch.testing.assert_close(model.forward_head(hidden), hidden @ model.emb.weight.T)


def test_the_frame_does_what_it_is_told() -> None:
    model = Contender("rwkv4").build(50, {"hidden_size": 16, "num_layers": 1}, Frame(embedding_std=1.0))
    assert 0.8 < model.emb.weight.std() < 1.2
    assert not isinstance(model.blocks[0].ffn, NoChannelMix)


def test_bytes_of_state() -> None:
    """Layers x (channels of each token shift + the memory), four bytes each; a cache grows with the length."""
    assert state_bytes(tiny("rwkv4"), 5) == 4 * 2 * (2 * 16 + 3 * 16)
    assert state_bytes(tiny("rwkv7"), 5) == state_bytes(tiny("rwkv7"), 50) == 4 * 2 * (2 * 16 + 16 * 8)
    assert [state_bytes(tiny("transformer"), length) for length in (5, 50)] == [4 * 2 * 2 * 16 * t for t in (5, 50)]
    assert state_bytes(tiny("transformer", window=7), 50) == 4 * 2 * 2 * 16 * 7
    model = tiny("rwkv7")
    remove_channel_mix(model)
    assert state_bytes(model, 5) == 4 * 2 * (16 + 16 * 8)
    assert state_bytes(tiny("rwkv7").to(torch.bfloat16), 5) == 4 * 2 * (2 * 16 + 16 * 8)
