"""Kernel features of the vectors of RWKV-7's recurrence, for `wkv.tuning.kernel_state` (our reconstruction).

Shape letters: B batch, T time, H heads, N head size, M support vectors, n vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.data import Batch
from wkv.errors import WkvError
from wkv.inference.engine import evaluating
from wkv.layers.language_model import LanguageModel

KERNELS = ("gaussian", "linear")
SUPPORTS = ("random", "kmeans", "identity")
ITERATIONS = 10  # of Lloyd's algorithm
VECTORS = 4096  # per head, from which support vectors and means are taken

Tokens = Iterable[Tensor | Batch]


class KernelFeatures(nn.Module):
    """phi(z)_m = K(z, u_m) per head, and what makes a recurrence of size M out of one of size N with it.

    Args:
        support: u [H, M, N].
        directions: removal directions, unit vectors [H, n, N], whose mean feature is subtracted; None: nothing is.
        kernel: "gaussian", K(z, u) = exp(-gamma |z - u|^2), or "linear", K(z, u) = z u.
        sharpness: c in gamma = c / (2 median |u_i - u_j|^2).

    Attributes:
        support, gamma [H], mean [H, M], readout [H, N, M]: constants that belong to what is trained with them.
    """

    support: Tensor
    gamma: Tensor
    mean: Tensor
    readout: Tensor

    def __init__(self, support: Tensor, directions: Tensor | None, kernel: str, sharpness: float) -> None:
        super().__init__()
        self.kernel = kernel
        self.register_buffer("support", support)
        self.register_buffer("gamma", sharpness / (2 * _median_distance(support)))
        self.register_buffer("readout", orthonormal_readout(support))
        self.register_buffer("mean", support.new_zeros(support.shape[:2]))
        if directions is not None:
            self.mean = self.phi(directions.to(support).transpose(0, 1)[None]).mean((0, 1))

    def phi(self, z_BTHN: Tensor) -> Tensor:
        """Features [B, T, H, M] of vectors [B, T, H, N]."""
        if self.kernel == "linear":
            return torch.einsum("hmn,bthn->bthm", self.support.to(z_BTHN.dtype), z_BTHN)
        return self.log_phi(z_BTHN).exp()

    def log_phi(self, z_BTHN: Tensor) -> Tensor:
        """Their logarithms."""
        if self.kernel == "linear":
            return self.phi(z_BTHN).log()
        u_HMN = self.support.to(z_BTHN.dtype)
        products_BTHM = torch.einsum("hmn,bthn->bthm", u_HMN, z_BTHN)
        squares_BTHM = z_BTHN.square().sum(-1, keepdim=True) - 2 * products_BTHM + u_HMN.square().sum(-1)
        return -self.gamma.to(z_BTHN.dtype)[:, None] * squares_BTHM.clamp_min(0)

    def directions(self, z_BTHN: Tensor) -> Tensor:
        """Unit features of unit vectors: phi less its mean, scaled to length 1."""
        return F.normalize(self.phi(z_BTHN) - self.mean.to(z_BTHN.dtype), dim=-1, eps=1e-12)

    def averages(self, z_BTHN: Tensor) -> Tensor:
        """Per support vector a mean of z's components, weighted by u_mj^2 / |u_m|^2: [B, T, H, M]."""
        squares_HMN = self.support.to(z_BTHN.dtype).square()
        return torch.einsum("hmn,bthn->bthm", squares_HMN / squares_HMN.sum(-1, keepdim=True), z_BTHN)

    def residual(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Arguments of `wkv7`, each [B, T, H, M], for a memory that only forgets.

        Per head A_t = diag(d) - kk^T (a * kk) with d and a averages of decay and iclr, and kk a unit vector. That is
        the form of RWKV-7's own, whose spectral radius is at most 1. What is read keeps the length of r.
        """
        r, log_w, _, _, kk, iclr = inputs
        length_BTH1 = r.norm(dim=-1, keepdim=True)
        read = length_BTH1 * self.directions(F.normalize(r, dim=-1, eps=1e-12))
        decay, removed = self.averages(log_w.exp()).log(), self.directions(kk)
        nothing = torch.zeros_like(read)
        return read, decay, nothing, nothing, -removed, self.averages(iclr) * removed

    def literal(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Arguments of `wkv7`, each [B, T, H, M]: phi of every vector takes the vector's place."""
        r, log_w, k, v, kk, iclr = inputs
        removed = self.phi(kk)
        return self.phi(r), self.log_phi(log_w.exp()), self.phi(k), self.phi(v), -removed, self.phi(iclr) * removed


def orthonormal_readout(support: Tensor) -> Tensor:
    """Q [H, N, M] with orthonormal rows: of the QR decomposition of u [H, M, N], with positive diagonal."""
    basis_HMN, triangle_HNN = torch.linalg.qr(support.double())
    signs_HN = torch.where(triangle_HNN.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (basis_HMN * signs_HN[:, None]).mT.to(support.dtype).contiguous()


def _median_distance(support: Tensor) -> Tensor:
    """Median over pairs of |u_i - u_j|^2, [H]."""
    i, j = torch.triu_indices(support.shape[1], support.shape[1], 1)
    return (support[:, i] - support[:, j]).square().sum(-1).median(-1).values.clamp_min(1e-12)


def choose_support(
    name: str, heads: int, size: int, head_size: int, directions: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Support vectors of one layer, [H, M, N].

    Args:
        name: "random" (unit vectors), "kmeans" (cluster centres of `directions`) or "identity" (e_1 .. e_N; M = N).
        size: M.
        directions: [H, n, N], for "kmeans".
        generator: draws vectors, and the first centres.

    Raises:
        WkvError: if there are fewer directions than support vectors.
    """
    if name == "identity":
        return torch.eye(head_size).repeat(heads, 1, 1)
    if name == "random":
        return unit_vectors(heads, size, head_size, generator)
    assert directions is not None
    if directions.shape[1] < size:
        raise WkvError(f"{size} cluster centres need as many tokens, found {directions.shape[1]}; give more batches")
    return kmeans(directions, size, generator)


def unit_vectors(heads: int, count: int, head_size: int, generator: torch.Generator) -> Tensor:
    """Random directions [H, n, N], uniform on the sphere."""
    return F.normalize(torch.randn(heads, count, head_size, generator=generator), dim=-1)


def kmeans(vectors_HnN: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` cluster centres per head, [H, count, N], by Lloyd's algorithm; a centre without vectors stays.

    Args:
        vectors_HnN: at least `count` per head; the first centres are drawn from them.
    """
    centres = vectors_HnN[:, torch.randperm(vectors_HnN.shape[1], generator=generator)[:count]]
    for _ in range(ITERATIONS):
        nearest_Hn = torch.cdist(vectors_HnN, centres).argmin(-1)
        member_Hnc = F.one_hot(nearest_Hn, count).to(vectors_HnN.dtype)
        sizes_Hc1 = member_Hnc.sum(1)[..., None]
        centres = torch.where(sizes_Hc1 > 0, member_Hnc.mT @ vectors_HnN / sizes_Hc1.clamp_min(1), centres)
    return centres


@torch.no_grad()
def removal_directions(model: LanguageModel, batches: Tokens, generator: torch.Generator) -> list[Tensor]:
    """What each head of each layer removes while the model reads: per layer unit vectors [H, n, N] on the CPU.

    Args:
        model: an RWKV-7; its time mixes are listened to through `side_memory`.
        batches: tokens int64 [B, T] or `wkv.data.Batch`; more vectors than `VECTORS` per head are drawn from.

    Raises:
        WkvError: if there are no tokens.
    """
    found: list[list[Tensor]] = [[] for _ in model.blocks]
    before = [block.att.side_memory for block in model.blocks]
    try:
        for block, vectors in zip(model.blocks, found, strict=True):
            block.att.side_memory = _recorder(vectors)
        with evaluating(model):
            for batch in batches:
                tokens, mask = (batch.inputs, batch.mask) if isinstance(batch, Batch) else (batch, None)
                device = model.ln_out.weight.device
                model(tokens.to(device), mask=None if mask is None else mask.to(device))
    finally:
        for block, memory in zip(model.blocks, before, strict=True):
            block.att.side_memory = memory
    if not found[0]:
        raise WkvError("batches holds no tokens from which support vectors could be taken")
    return [_drawn(torch.cat(vectors, 1), generator) for vectors in found]


def _recorder(vectors: list[Tensor]) -> Any:
    def record(y: Tensor, inputs: tuple[Tensor, ...], state: Any, timeline: Any) -> tuple[Tensor, dict[str, Tensor]]:
        kk_BTHN = inputs[4]
        real = kk_BTHN.flatten(0, 1) if timeline.mask is None else kk_BTHN[timeline.mask]
        vectors.append(real.transpose(0, 1).float().cpu())
        return y, {}

    return record


def _drawn(vectors_HnN: Tensor, generator: torch.Generator) -> Tensor:
    return vectors_HnN[:, torch.randperm(vectors_HnN.shape[1], generator=generator)[:VECTORS]]
