"""Token-parameter attention as in TokenFormer (Haiyang-W/TokenFormer), which Meta-State is compared with.

A linear map whose matrix is replaced by n parameter tokens, each a key and a value, so that more can be added later:

    scores = x K^T,    out = weights(scores) V

    l2_norm_gelu:  gelu(scores / |scores|_2 * sqrt(n))    (the default)
    gelu_l2_norm:  g / |g|_2 * sqrt(n) with g = gelu(scores)
    softmax:       softmax(scores) * n

A token whose key is zero has a score of zero, and gelu(0) = 0: for the first two forms it changes nothing, but for the
factor sqrt(n), which must be kept at the old n. Under softmax zero scores take weight from the others.

Shape letters: I inputs, O outputs, P parameter tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.norms import wide

NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


class Pattention(nn.Module):
    """Attention of tokens to parameter tokens.

    Args:
        inputs: I.
        outputs: O.
        tokens: P.
        norm: how scores become weights; one of `NORMS`.
        value_std: deviation of the initial values; TokenFormer takes 2 / (layers * sqrt(width)).

    Attributes:
        key: [P, I], initially normal with deviation 0.02.
        value: [P, O].
        scale: the factor of the weights, a buffer: sqrt(P) or, for softmax, P, of the time when the layer was made.
    """

    scale: Tensor

    def __init__(
        self, inputs: int, outputs: int, tokens: int, norm: str = "l2_norm_gelu", value_std: float = 0.02
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise WkvError(f"norm {norm!r} is unknown; one of {', '.join(NORMS)}")
        self.norm, self.value_std = norm, value_std
        self.key = nn.Parameter(torch.empty(tokens, inputs))
        self.value = nn.Parameter(torch.empty(tokens, outputs))
        self.register_buffer("scale", torch.tensor(_scale(norm, tokens)))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return F.linear(self.weights(F.linear(x, self.key)), self.value.mT)

    def weights(self, scores: Tensor) -> Tensor:
        """Scores [..., P] -> weights of the values, computed in float32, in the type of the scores."""
        with torch.autocast(scores.device.type, enabled=False):
            s, scale = wide(scores), wide(self.scale)
            if self.norm == "softmax":
                s = torch.softmax(s, -1) * scale
            elif self.norm == "gelu_l2_norm":
                s = F.normalize(F.gelu(s), dim=-1, eps=1e-12) * scale
            else:
                s = F.gelu(F.normalize(s, dim=-1, eps=1e-12) * scale)
            return s.to(scores.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of keys and values."""
        nn.init.normal_(self.key, std=0.02)
        nn.init.normal_(self.value, std=self.value_std)

    @torch.no_grad()
    def grown(self, tokens: int, freeze_scale: bool = True) -> Pattention:
        """A copy with `tokens` more parameter tokens, with keys of zeros and initial values.

        Args:
            tokens: how many to add.
            freeze_scale: keep the factor, so that the copy computes what this layer does. Without it the factor is
                that of the new number of tokens, as in TokenFormer, and the output changes.

        Raises:
            WkvError: for softmax with `freeze_scale`: new tokens would take weight even so.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise WkvError(f"tokens must be a positive integer, found {tokens!r}")
        if self.norm == "softmax" and freeze_scale:
            raise WkvError(
                "under softmax new tokens take weight from old ones: they cannot be added without changing the output "
                "(freeze_scale=False adds them)"
            )
        (old, inputs), outputs = self.key.shape, self.value.shape[1]
        new = Pattention(inputs, outputs, old + tokens, self.norm, self.value_std).to(self.key)
        new.key[:old], new.key[old:], new.value[:old] = self.key, 0.0, self.value
        if freeze_scale:
            new.scale.copy_(self.scale)
        return new.train(self.training)


def _scale(norm: str, tokens: int) -> float:
    return float(tokens) if norm == "softmax" else math.sqrt(tokens)
