"""Decorrelated backpropagation, DBP (Dalm, Offergeld, Ahmad, van Gerven, arXiv 2405.02385; code artcogsys/decorbp).

Before a linear map W comes z = R x. W is trained by gradients; R, which starts as the identity, by a local rule that
makes the components of z uncorrelated and of unit size: steps of gradients are then as long in every direction.

The rule is that of the code. Its place in state tuning is our reconstruction, and exact: a tuned initial state acts on
the outputs as a linear layer, y_t = (what does not depend on S_0) + S_0 x_t. Here x_t = A_1 A_2 ... A_t r_t is what the
recurrence gives that starts from the identity and is written nothing. So S_0 = W R, and once trained W R is folded into
one matrix.

Shape letters: B batch, T time, H heads, V outputs, K inputs, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wkv.errors import WkvError


@dataclass(frozen=True)
class Decorrelation:
    """The rule for R. With X = E[z z^T], C = X without its diagonal and v = E[z^2] - 1 a step is

        R <- R - rate ((1 - kappa) C R + kappa diag(v) R)

    The expectation is over the vectors at hand. Defaults are those of the released configurations.

    Args:
        rate: step length.
        kappa: from 0 (only decorrelate) to 1 (only scale to unit size).
        normalized: weigh the terms by (1 - kappa) / (K - 1) and 2 kappa, so that they do not grow with K.
        full: C as above; else only below the diagonal, column j (from 0) times sqrt(j).
        reference: scale the columns of R by v, R diag(v), as the released code does; only for comparisons with it. The
            rows, diag(v) R, are the gradient of the size of each z_i.
        sample: part of the vectors from which expectations are taken, evenly spaced.

    Raises:
        WkvError: for numbers out of range.
    """

    rate: float = 1e-4
    kappa: float = 0.01
    normalized: bool = False
    full: bool = True
    reference: bool = False
    sample: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.rate < float("inf") or not 0 <= self.kappa <= 1 or not 0 < self.sample <= 1:
            found = f"rate {self.rate!r}, kappa {self.kappa!r}, sample {self.sample!r}"
            raise WkvError(f"decorrelation needs rate >= 0, kappa from 0 to 1 and 0 < sample <= 1, found {found}")

    @property
    def stride(self) -> int:
        """Every how many vectors one counts."""
        return max(1, round(1 / self.sample))

    def step(self, R_KK: Tensor, X_KK: Tensor) -> Tensor:
        """R after one step.

        Args:
            R_KK: [..., K, K], not changed.
            X_KK: E[z z^T] with z = R x, [..., K, K].
        """
        C_KK, v_K = self._terms(X_KK)
        correlated, sized = self._weights(R_KK.shape[-1])
        scaled = R_KK * (v_K[..., None, :] if self.reference else v_K[..., :, None])
        return R_KK - self.rate * (correlated * (C_KK @ R_KK) + sized * scaled)

    def loss(self, X_KK: Tensor) -> Tensor:
        """How far z is from uncorrelated components of unit size, [...]; 0 if it has reached that."""
        C_KK, v_K = self._terms(X_KK)
        size = X_KK.shape[-1]
        off, own = (1 - self.kappa) * C_KK.square().sum((-2, -1)), self.kappa * v_K.square().sum(-1)
        return (off / max(1, size - 1) + own) / size if self.normalized else (off + own) / size**2

    def _terms(self, X_KK: Tensor) -> tuple[Tensor, Tensor]:
        """C [..., K, K] and v [..., K]."""
        v_K = X_KK.diagonal(dim1=-2, dim2=-1) - 1
        if self.full:
            return X_KK - torch.diag_embed(v_K + 1), v_K
        factors_K = torch.arange(X_KK.shape[-1], device=X_KK.device, dtype=X_KK.dtype).sqrt()
        return factors_K * X_KK.tril(-1), v_K

    def _weights(self, size: int) -> tuple[float, float]:
        if self.normalized:
            return (1 - self.kappa) / max(1, size - 1), 2 * self.kappa
        return 1 - self.kappa, self.kappa


def covariance(z_nK: Tensor) -> Tensor:
    """E[z z^T] [..., K, K] of vectors [..., n, K]."""
    return z_nK.mT @ z_nK / z_nK.shape[-2]


class DecorrelatedMatrix(nn.Module):
    """W R per head: W is a parameter, R follows the rule.

    In training mode every pass takes part in the expectations. R makes its step at the beginning of the first pass
    after W has changed, so whatever trains W trains R, and R is the same in all passes between two steps of W. (Fused
    optimisers do not count their changes, so W is compared with a copy.)

    Args:
        value: what W R is at first, [H, V, K]; R is the identity then.
        rule: for R.

    Attributes:
        weight: W [H, V, K].
        decorrelation: R [H, K, K].
        loss: of the rule at R's last step, [H]; None before that.
    """

    decorrelation: Tensor

    def __init__(self, value: Tensor, rule: Decorrelation) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(value)
        identity = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        self.register_buffer("decorrelation", identity.repeat(value.shape[0], 1, 1))
        self.loss: Tensor | None = None
        self._sum: Tensor | None = None  # of z z^T over `_count` vectors since the last step, all while W was `_seen`
        self._seen: Tensor | None = None
        self._count = 0

    def forward(self, x_BTHK: Tensor) -> Tensor:
        """W R x for x [B, T, H, K] -> [B, T, H, V]. Vectors of zeros stand for no token and do not count."""
        if self.training:
            self.settle()
        with torch.autocast(x_BTHK.device.type, enabled=False):
            z_BTHK = torch.einsum("hij,bthj->bthi", self.decorrelation.to(x_BTHK.dtype), x_BTHK)
            if self.training and torch.is_grad_enabled():
                self._collect(z_BTHK.detach())
            return torch.einsum("hvk,bthk->bthv", self.weight.to(x_BTHK.dtype), z_BTHK)

    @torch.no_grad()
    def decorrelate(self) -> None:
        """Let R make its step, if there has been a pass since the last one."""
        if self._sum is not None and self._count:
            X_HKK = (self._sum / self._count).to(self.decorrelation)
            self.loss = self.rule.loss(X_HKK)
            self.decorrelation.copy_(self.rule.step(self.decorrelation, X_HKK))
        self._sum, self._seen, self._count = None, None, 0

    def settle(self) -> None:
        """`decorrelate`, if W has changed since the last pass: what the next pass in training mode would do."""
        if self._seen is not None and not torch.equal(self._seen.to(self.weight), self.weight):
            self.decorrelate()

    @torch.no_grad()
    def folded(self) -> Tensor:
        """W R as one matrix per head, [H, V, K]."""
        return self.weight @ self.decorrelation

    def _collect(self, z_BTHK: Tensor) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise WkvError("decorrelated state tuning (dbp) runs in one process: R would differ between several")
        z_nHK = z_BTHK.flatten(0, 1)
        z_nHK = z_nHK[(z_nHK != 0).any(-1).any(-1)][:: self.rule.stride]
        total = torch.einsum("nhi,nhj->hij", z_nHK, z_nHK)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(z_nHK)
        if self._seen is None:
            self._seen = self.weight.detach().clone()
