"""The transformer against the Llama of transformers, and what is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wkv
from wkv.errors import WkvError

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_layers": 3, "head_size": 8, "ffn_size": 48}
NAMES = {
    "att.query": "self_attn.q_proj", "att.key": "self_attn.k_proj", "att.value": "self_attn.v_proj",
    "att.output": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj", "ln1": "input_layernorm", "ln2": "post_attention_layernorm",
}  # fmt: skip


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    model = wkv.create_model("transformer", **{**SIZES, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("tied_head", [False, True])
def test_is_llama(tied_head: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(key_value_heads=2, tied_head=tied_head)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=tied_head, max_position_embeddings=64,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).double().eval()
    names = {"emb": "model.embed_tokens", "ln_out": "model.norm", "head": "lm_head"}
    for layer in range(3):
        names |= {f"blocks.{layer}.{own}": f"model.layers.{layer}.{other}" for own, other in NAMES.items()}
    values = {names[key.removesuffix(".weight")] + ".weight": value for key, value in model.state_dict().items()}
    missing, unexpected = llama.load_state_dict(values, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied_head else [])
    ids = torch.arange(40).reshape(2, 20) * 7 % 50
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-5, rtol=1e-5)  # it rotates in float32


def test_a_tied_head_is_one_parameter_and_learns_from_both_ends(tmp_path: Any) -> None:
    from wkv.training.head_loss import head_loss
    from wkv.training.losses import next_token_loss

    model = build(tied_head=True)
    assert "head.weight" not in dict(model.named_parameters())
    assert model.num_parameters == build().num_parameters - 50 * 32
    ids, targets = torch.arange(16).reshape(2, 8), torch.arange(16, 32).reshape(2, 8)
    next_token_loss(model(ids).logits, targets).backward()
    wanted = model.emb.weight.grad.clone()
    model.zero_grad()
    head_loss(model.forward_features(ids)[0], model.head, targets).backward()
    torch.testing.assert_close(model.emb.weight.grad, wanted)
    wkv.save_model(model, tmp_path / "m.safetensors")
    loaded = wkv.load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with torch.no_grad():
        loaded.emb.weight.zero_()
    assert not loaded(ids).logits.any()


def test_states_of_different_lengths_go_into_one_batch() -> None:
    model = build(window=6)
    with torch.no_grad():
        states = [model(torch.arange(n)[None] + 1).state for n in (2, 9)]
        together = model(torch.tensor([[3, 4], [3, 4]]), wkv.State.stack(states)).logits
        for row, state in enumerate(states):
            torch.testing.assert_close(together[row], model(torch.tensor([[3, 4]]), state).logits[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_value_heads": 3}, "key_value_heads 3 does not divide the 4 heads"),
        ({"head_size": 1}, "rotary positions turn pairs of channels, found head_size 1"),
        ({"positions": "learned"}, "positions must be one of 'rotary', 'none', found 'learned'"),
        ({"window": 0}, "window must be a positive integer, found 0"),
        ({"tied_head": 1}, "tied_head must be true or false, found 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        build(**options)
