"""The Bone family: adapters whose one small tensor is shared by all blocks of a weight.

Bone (arXiv 2409.15371, versions 1 to 3, "Bat" in later ones; github.com/JL-er/Bone) adds W B + B block by block: the
weight itself guides the update, which has full rank with few parameters. MiSS (later versions of the same paper, there
also "DiSHA") leaves the guide out and adds the shared matrix alone. All start from zero, and unlike with LoRA every
parameter has a gradient from the first step on. There is no scale.

A weight W [O, I] in blocks W[a, b] of side r, a one of O / r output blocks and b one of I / r input blocks:

    bone-col    B [O / r, r, r]         W'[a, b] = W[a, b] + W[a, b] B[a] + B[a]
    bone-row    B [I / r, r, r]         W'[a, b] = W[a, b] + W[a, b] B[b] + B[b]
    bone-ab     A, B [I / r, r, r]      W'[a, b] = W[a, b] + W[a, b] A[b] + B[b]
    miss        D [r, O]                W'[o, j] = W[o, j] + D[j mod r, o]
    miss-mini   D [r, m], m divides O   W'[o, j] = W[o, j] + D[j mod r, o mod m]

Shape letters: O outputs, I inputs, r rank, m mini rank, P = O / r and Q = I / r blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.norms import wide
from wkv.tuning.bone_product import InputGuided, OutputGuided, Shared
from wkv.tuning.options import check_rank
from wkv.tuning.side import Side

GUIDED = ("bone-col", "bone-row", "bone-ab")
VARIANTS = (*GUIDED, "miss", "miss-mini")

# Largest condition number of I + B that `unmerge_weight` accepts: beyond it fewer than two digits of float32 are left.
LARGEST_CONDITION = 1e5


class BoneSide(Side):
    """What an adapter of the Bone family adds to one layer; zero at first.

    Nothing of the size of the weight is kept for the backward pass; "bone-col" holds one changed weight while it
    multiplies in 32 bits, the others never make one. With layers of 16 bits, and under autocast, updates far smaller
    than the rounding of the weights still have their effect.

    Args:
        variant: one of `VARIANTS`.
        out_features, in_features: O, I of the layer.
        rank: r.
        mini_rank: m, of "miss-mini" alone.

    Raises:
        WkvError: for an unknown variant, or sizes that do not fit.
    """

    def __init__(
        self, variant: str, out_features: int, in_features: int, rank: int, mini_rank: int | None = None
    ) -> None:
        super().__init__()
        self.variant, self.rank, self.mini_rank = variant, rank, mini_rank
        self.out_features, self.in_features = out_features, in_features
        for name, shape in parameter_shapes(variant, out_features, in_features, rank, mini_rank).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """x [..., I] -> y [..., O] in the type of `base(x)`.

        Raises:
            WkvError: if x has another size, or the layer's own weight is to be trained as well.
        """
        if x.shape[-1] != self.in_features:
            raise WkvError(f"expected [..., {self.in_features}], found {list(x.shape)}")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in base.parameters()):
            raise WkvError("the layer under an adapter must be frozen; call requires_grad_(False) on it")
        own = self._parameters
        if self.variant == "bone-col":
            y: Tensor = OutputGuided.apply(x, own["B"], base)
        elif self.variant in GUIDED:
            y = InputGuided.apply(x, own["A"] if "A" in own else own["B"], own["B"] if "A" in own else None, base)
        else:
            y = Shared.apply(x, own["D"], base)
        return y

    def merged_weight(self, weight: Tensor) -> Tensor:
        """See `Side` and `merge_weight`."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return merge_weight(self.variant, weight, own)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        mini = "" if self.mini_rank is None else f", mini_rank={self.mini_rank}"
        return f"{self.variant}, {self.in_features} -> {self.out_features}, rank={self.rank}{mini}"


def parameter_shapes(
    variant: str, out_features: int, in_features: int, rank: int, mini_rank: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters; arguments as those of `BoneSide`.

    Raises:
        WkvError: for an unknown variant, or sizes that do not fit.
    """
    check_variant(variant)
    check_rank(rank)
    if (mini_rank is not None) != (variant == "miss-mini"):
        problem = "needs a mini_rank that divides the outputs" if mini_rank is None else "takes no mini_rank"
        raise WkvError(f"{variant} {problem}")
    if variant in GUIDED:
        if math.gcd(out_features, in_features) % rank:
            raise WkvError(_not_divided(variant, out_features, in_features, rank))
        blocks = (out_features if variant == "bone-col" else in_features) // rank
        return {name: (blocks, rank, rank) for name in ("A", "B") if name == "B" or variant == "bone-ab"}
    if rank > in_features:
        raise WkvError(f"rank {rank} is larger than in_features {in_features}; choose at most that")
    if mini_rank is not None and out_features % check_rank(mini_rank, "mini_rank"):
        best = _largest_divisor(out_features, mini_rank)
        raise WkvError(f"mini_rank {mini_rank} does not divide out_features {out_features}; {best} would")
    return {"D": (rank, mini_rank or out_features)}


def check_variant(variant: str) -> str:
    """`variant`, if it is one of `VARIANTS`.

    Raises:
        WkvError: for any other.
    """
    if variant not in VARIANTS:
        raise WkvError(f"{variant!r} is not a variant of Bone; one of {', '.join(VARIANTS)}")
    return variant


def _not_divided(variant: str, out_features: int, in_features: int, rank: int) -> str:
    sizes = f"rank {rank} does not divide both out_features {out_features} and in_features {in_features}"
    best = _largest_divisor(math.gcd(out_features, in_features), rank)
    return f"{sizes}, as {variant} needs it; choose {best}, or miss, which takes layers of any size"


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)


# ---------------------------------------------------------------- merging


@torch.no_grad()
def merge_weight(variant: str, weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """W' [O, I], a new tensor, in float32 (float64 if the weight is).

    Args:
        variant: one of `VARIANTS`.
        weight: W [O, I].
        parameters: A, B or D, in any floating type.

    Raises:
        WkvError: for an unknown variant, or shapes that do not fit.
    """
    own = _fitting(variant, weight, parameters)
    weight = wide(weight)
    if variant not in GUIDED:
        return weight + _tiled(own["D"], weight)
    rank = own["B"].shape[-1]
    blocks = _group(variant, weight, rank)
    update = torch.bmm(blocks, own["A"] if variant == "bone-ab" else own["B"])
    return _add_shared(variant, weight + _ungroup(variant, update, weight), own["B"])


@torch.no_grad()
def unmerge_weight(variant: str, merged: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """W [O, I] from W', for files where only the merged weight is left; in float32, solved in float64.

    What merging rounded away does not come back: prefer the base's own file where there is one.

    Args:
        variant: one of `VARIANTS`.
        merged: W' [O, I].
        parameters: A, B or D.

    Raises:
        WkvError: for an unknown variant, shapes that do not fit, or where I + B (bone-ab: I + A) has no usable inverse.
    """
    own = {name: value.double() for name, value in _fitting(variant, merged, parameters).items()}
    exact = merged.double()
    if variant not in GUIDED:
        return (exact - _tiled(own["D"], exact)).float()
    factor = own["A" if variant == "bone-ab" else "B"] + torch.eye(own["B"].shape[-1], device=exact.device)
    if not bool(factor.isfinite().all()):
        raise WkvError("the adapter has infinite or NaN values; nothing can be undone with it")
    condition = torch.linalg.cond(factor)
    worst = int(condition.argmax())
    if not bool(condition[worst] <= LARGEST_CONDITION):
        name, found = "I + A" if variant == "bone-ab" else "I + B", f"{float(condition[worst]):.1e}"
        raise WkvError(
            f"{name} is near singular in block {worst} (condition {found}, at most {LARGEST_CONDITION:.0e} can be "
            "undone); take the weight from the base's own file"
        )
    exact = _add_shared(variant, exact, -own["B"])
    blocks = _group(variant, exact, factor.shape[-1])
    return _ungroup(variant, torch.linalg.solve(factor, blocks, left=False), exact).float()


def _fitting(variant: str, weight: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters in float32 (float64 if the weight is), if they fit."""
    check_variant(variant)
    name = "B" if variant in GUIDED else "D"
    if weight.ndim != 2 or name not in parameters or parameters[name].ndim != (3 if name == "B" else 2):
        found = f"{list(weight.shape)} and " + ", ".join(f"{n} {list(p.shape)}" for n, p in parameters.items())
        raise WkvError(f"{variant} needs a matrix and its {name}, found {found}")
    rank = parameters[name].shape[-1 if name == "B" else 0]
    mini = parameters[name].shape[1] if variant == "miss-mini" else None
    expected = parameter_shapes(variant, weight.shape[0], weight.shape[1], rank, mini)
    found_shapes = {key: tuple(value.shape) for key, value in parameters.items()}
    if found_shapes != expected:
        raise WkvError(f"{variant} on a layer {list(weight.shape)} needs {expected}, found {found_shapes}")
    dtype = wide(weight.new_empty(0)).dtype
    return {key: value.detach().to(weight.device, dtype) for key, value in parameters.items()}


def _tiled(d_rm: Tensor, weight_OI: Tensor) -> Tensor:
    """D^T repeated over inputs and outputs [O, I]."""
    rows, columns = (torch.arange(size, device=d_rm.device) for size in weight_OI.shape)
    return d_rm.T[rows % d_rm.shape[1]][:, columns % d_rm.shape[0]]


def _group(variant: str, weight_OI: Tensor, rank: int) -> Tensor:
    """Pieces of r inputs, gathered by the block they meet: [P, O I / P r, r], or [Q, O, r]."""
    if variant == "bone-col":
        return weight_OI.reshape(weight_OI.shape[0] // rank, -1, rank)
    return weight_OI.unflatten(1, (-1, rank)).transpose(0, 1)


def _ungroup(variant: str, blocks: Tensor, weight_OI: Tensor) -> Tensor:
    return (blocks if variant == "bone-col" else blocks.transpose(0, 1)).reshape(weight_OI.shape)


def _add_shared(variant: str, weight_OI: Tensor, blocks: Tensor) -> Tensor:
    """W[a, b] + B[a] or B[b]."""
    rank = blocks.shape[-1]
    grid_PrQr = weight_OI.unflatten(1, (-1, rank)).unflatten(0, (-1, rank))
    shared = blocks[:, :, None] if variant == "bone-col" else blocks.transpose(0, 1)
    return (grid_PrQr + shared).reshape(weight_OI.shape)


# ---------------------------------------------------------------- LoRA


def miss_to_lora(matrix: Tensor, in_features: int, out_features: int | None = None) -> tuple[Tensor, Tensor]:
    """The LoRA that is exactly this MiSS: y = x W^T + (x A^T) B^T, scale 1.

    Args:
        matrix: D [r, O], or [r, m] of "miss-mini".
        in_features: I.
        out_features: O; by default the columns of D.

    Returns:
        A [r, I], the identity side by side, and B [O, r].

    Raises:
        WkvError: for sizes that do not fit.
    """
    if matrix.ndim != 2:
        raise WkvError(f"D must be [rank, outputs], found {list(matrix.shape)}")
    rank, columns = matrix.shape
    outputs = columns if out_features is None else out_features
    parameter_shapes("miss-mini", outputs, in_features, rank, columns)
    tiles = -(-in_features // rank)
    a = torch.eye(rank, dtype=matrix.dtype, device=matrix.device).repeat(1, tiles)[:, :in_features].contiguous()
    return a, matrix.detach().T.repeat(outputs // columns, 1)


class EqualRank(NamedTuple):
    """The rank with the nearest number of parameters: `parameters`, where `wanted` were asked for."""

    rank: int
    parameters: int
    wanted: int


def count_parameters(method: str, shapes: Iterable[tuple[int, int]], rank: int, mini_rank: int | None = None) -> int:
    """Parameters of an adapter on layers of these shapes.

    Args:
        method: one of `VARIANTS`, or "lora" (also for those of its family with as many parameters).
        shapes: (O, I) of every layer.
        rank: r.
        mini_rank: m, of "miss-mini".

    Raises:
        WkvError: for an unknown method, or a layer that the rank does not fit.
    """
    if method == "lora":
        return check_rank(rank) * sum(o + i for o, i in shapes)
    own = (parameter_shapes(method, o, i, rank, mini_rank).values() for o, i in shapes)
    return sum(math.prod(shape) for layer in own for shape in layer)


def equal_rank(
    method: str, shapes: Iterable[tuple[int, int]], like: str, like_rank: int, mini_rank: int | None = None
) -> EqualRank:
    """The rank at which `method` has about as many parameters as `like` has with `like_rank`.

    >>> equal_rank("lora", [(2048, 2048)], "miss", 64)
    EqualRank(rank=32, parameters=131072, wanted=131072)

    Args:
        method, like: one of `VARIANTS`, or "lora".
        shapes: (O, I) of every layer.
        like_rank: r of `like`.
        mini_rank: m, if one of the two is "miss-mini".

    Raises:
        WkvError: as `count_parameters`.
    """
    shapes = list(shapes)
    if not shapes:
        raise WkvError("name the shape (outputs, inputs) of at least one layer")
    own_mini = {name: mini_rank if name == "miss-mini" else None for name in (method, like)}
    wanted = count_parameters(like, shapes, like_rank, own_mini[like])
    each = count_parameters(method, shapes, 1, own_mini[method])  # counts are multiples of the rank
    rank = min(_possible_ranks(method, shapes), key=lambda r: abs(r * each - wanted))
    return EqualRank(rank, rank * each, wanted)


def _possible_ranks(method: str, shapes: list[tuple[int, int]]) -> list[int]:
    """Ranks that fit all layers, ascending."""
    if method in GUIDED:
        common: Any = math.gcd(*(size for shape in shapes for size in shape))
        return [rank for rank in range(1, common + 1) if common % rank == 0]
    largest = min(min(shape) if method == "lora" else shape[1] for shape in shapes)
    return list(range(1, largest + 1))
