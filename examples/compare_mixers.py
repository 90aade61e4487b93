"""Compare your own mixer with RWKV-4 and RWKV-7 on recall: python examples/compare_mixers.py [steps]."""

import sys

import torch
from torch import nn

from wkv.evaluation.synthetic.comparison import compare
from wkv.evaluation.synthetic.plan import Changes
from wkv.evaluation.synthetic.plot import plot
from wkv.evaluation.synthetic.report import markdown
from wkv.layers.language_model import Block
from wkv.models.rwkv7 import RWKV7, ChannelMix, RWKV7Config
from wkv.registry import register_model


class PreviousToken(nn.Module):
    """A mixer that remembers one token: out = W (x_t, x_{t-1})."""

    def __init__(self, config):
        super().__init__()
        self.output = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, z, carry, state, timeline):
        """Normed input [B, T, C] -> output, carry as it was, new state."""
        previous, last = timeline.shift(z, state["att_shift"])
        return self.output(torch.cat([z, previous], -1)), carry, {"att_shift": last}

    def reset_parameters(self):
        """PyTorch's own initial values."""
        self.output.reset_parameters()


@register_model("previous_token", RWKV7Config)
class PreviousTokenModel(RWKV7):
    """RWKV-7 with that mixer in place of its time mix."""

    name = "previous_token"

    def build_block(self, config, layer):
        """The mixer and RWKV-7's channel mix."""
        return Block(config, layer, PreviousToken(config), ChannelMix(config, layer))

    def init_layer_state(self, batch_size, shift, wide, layer):
        """Two tokens: that of the mixer and that of the channel mix."""
        return {name: shift.new_zeros(batch_size, self.config.hidden_size) for name in ("att_shift", "ffn_shift")}


def main(steps: str = "200") -> None:
    """Recall of two pairs; tables on the screen, the picture in compare_mixers.png."""
    changes = Changes(task={"vocab_size": 32, "length": 16, "pairs": 2}, train={"steps": int(steps), "eval_every": 25})
    result = compare("mqar", ["previous_token", "rwkv4", "rwkv7:head_size=16"], "quick", changes, seeds=[0, 1])
    print(markdown(result))
    plot(result, "compare_mixers.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
