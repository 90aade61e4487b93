"""The LoRA family as adapters: what the methods are is the business of peft, whose layers are used.

With W [O, I] frozen, A [R, I] and B [O, R] trained, and the scale s = alpha / R:

- LoRA (arXiv 2106.09685): y = W x + s B A x, A random and B zero at first.
- rsLoRA (2312.03732): s = alpha / sqrt(R).
- LoRA+ (2402.12354): B learns `learning_rate_ratio` times as fast as A.
- DoRA (2402.09353): y = m V x / |V| with V = W + s B A, |V| the norm of each row, and m trained, |W| at first.
- PiSSA (2404.02948): s B A is at first the best approximation of W of rank R, the rest of W is frozen.
- OLoRA (2406.01775): at first B holds the first columns of Q and A the first rows of R of the decomposition W = Q R.
- LoRA-GA (2407.05000): A and B start as singular vectors of the mean gradient of W on a few batches.

Shape letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.adapter import WeightAdapter
from wkv.tuning.mean_gradients import mean_gradients
from wkv.tuning.options import check_options, check_rank
from wkv.tuning.peft_side import NAME, PeftSide, import_peft, make_layer, readable
from wkv.tuning.raw_parameters import RawSides, split_targets
from wkv.tuning.side import Side, layer_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of all methods of the family; "lora", "rslora", "dora" and "olora" have no others.

    Args:
        rank: R.
        alpha: by default `rank`: the scale is 1, that of rsLoRA sqrt(R).
        dropout: share of the inputs of A that are dropped while training.
        targets: see `wkv.tuning.mounting.choose_layers`. "lora", "rslora" and "lora-plus" also take matrices that are
            no layer, such as "att.w1" or "time_maa_w1".
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        object.__setattr__(self, "alpha", self.rank if self.alpha is None else self.alpha)
        _check_number("alpha", self.alpha, 0)
        _check_number("dropout", self.dropout, 0, 1)

    def stored(self) -> dict[str, Any]:
        """What a file keeps of them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values.pop("batches", None)
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPlusOptions(LoraOptions):
    """Options of "lora-plus".

    Args:
        learning_rate_ratio: factor on the learning rate of B.
    """

    learning_rate_ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("learning_rate_ratio", self.learning_rate_ratio, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PissaOptions(LoraOptions):
    """Options of "pissa".

    Args:
        niter: None for the exact decomposition; or steps of a fast approximate one: large matrices take a while, and
            with slowly falling singular values it misses their largest ones. The start is the model's in either case.
    """

    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None:
            check_rank(self.niter, "niter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraGaOptions(LoraOptions):
    """Options of "lora-ga".

    Args:
        direction: which singular vectors of the gradient A and B get: "ArB2r", "A2rBr", "ArBr" or "random".
        scale: of B: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: of the scale "stable".
        batches: what the gradient is estimated on: `wkv.data.Batch`es or pairs of inputs and targets, int64 [B, T].
            Files do not keep them.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16
    batches: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("direction", self.direction, ("ArB2r", "A2rBr", "ArBr", "random"))
        _check_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        _check_number("stable_gamma", self.stable_gamma, 0)


OPTIONS: dict[str, type[LoraOptions]] = {
    "lora": LoraOptions,
    "rslora": LoraOptions,
    "dora": LoraOptions,
    "lora-plus": LoraPlusOptions,
    "pissa": PissaOptions,
    "olora": LoraOptions,
    "lora-ga": LoraGaOptions,
}
RAW = ("lora", "rslora", "lora-plus")  # methods for matrices that are no layer
FROM_WEIGHT = ("pissa", "olora", "lora-ga")  # methods whose start is a part of the weight


class PeftAdapter(WeightAdapter):
    """LoRA and its kin; options see `LoraOptions` and its subclasses.

    Parameters are float32 for bases of any type, and bases may be quantised, except that LoRA-GA needs their gradient.
    """

    @classmethod
    def build(
        cls, model: LanguageModel, method: str, name: str, options: dict[str, Any], restoring: bool = False
    ) -> PeftAdapter:
        """See `Adapter`."""
        kind = OPTIONS[method]
        settings = kind(**check_options(method, options, kind.__init__, skip=1))
        return cls(model, method, name, settings, restoring)

    def __init__(
        self, model: LanguageModel, method: str, name: str, settings: LoraOptions, restoring: bool = False
    ) -> None:
        import_peft()
        layers, raw = split_targets(model, settings.targets)
        only_raw = bool(raw) and not layers
        super().__init__(model, method, name, settings.stored(), None if only_raw else layers)
        self.paths = [] if only_raw else self.paths
        self.settings, self.restoring = settings, restoring
        if raw and method not in RAW:
            raise WkvError(f"{method} is for linear layers, and {raw[0]} is none; {', '.join(RAW)} can adapt it")
        if raw and settings.dropout:
            raise WkvError(f"dropout is for linear layers, and {raw[0]} is none; leave one of them out")
        self.raw = RawSides(model, name, raw, settings.rank, self.scale)
        self._gradients: dict[str, Tensor] = {}

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        rank, alpha = self.settings.rank, self.settings.alpha
        assert alpha is not None
        return alpha / (math.sqrt(rank) if self.method == "rslora" else rank)

    def build_side(self, path: str, layer: Any) -> Side:
        """See `WeightAdapter`."""
        starts = self.method in FROM_WEIGHT
        weight = layer_weight(layer)
        if not self.restoring:
            self._check(weight)
        made = make_layer(self.config(), weight, self._gradients.pop(path, None))
        if isinstance(self.settings, LoraGaOptions) and self.settings.scale == "weight_svd" and not self.restoring:
            _scale_to(made.lora_B[NAME].weight, weight)
        return PeftSide(made, layer, subtract=starts)

    def config(self) -> Any:
        """The `peft.LoraConfig` of one layer; when a file will bring the values, with a start that costs nothing."""
        settings = self.settings
        start: bool | str = True
        extra = {}
        if not self.restoring and isinstance(settings, PissaOptions):
            start = "pissa" if settings.niter is None else f"pissa_niter_{settings.niter}"
        elif not self.restoring and isinstance(settings, LoraGaOptions):
            start = "lora_ga"
            ga = import_peft().LoraGAConfig
            scale = "unit" if settings.scale == "weight_svd" else settings.scale
            extra["lora_ga_config"] = ga(settings.direction, scale, settings.stable_gamma)
        elif not self.restoring and self.method == "olora":
            start = "olora"
        return import_peft().LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, init_lora_weights=start,
            use_rslora=self.method == "rslora", use_dora=self.method == "dora", **extra,
        )  # fmt: skip

    def _check(self, weight: Tensor) -> None:
        """Refuse what gives no numbers, or factors of another rank."""
        needed = self.settings.rank * (2 if self.method == "lora-ga" else 1)
        if self.method in FROM_WEIGHT and needed > min(weight.shape):
            most = min(weight.shape) // (2 if self.method == "lora-ga" else 1)
            raise WkvError(f"{self.method} of a matrix {list(weight.shape)} needs a rank of at most {most}")
        if self.method == "dora" and not bool(weight.any(1).all()):
            raise WkvError("DoRA divides by the norms of the rows, and one is zero; leave the layer out of targets")
        if self.method == "pissa" and not bool(weight.any()):
            raise WkvError("PiSSA starts from the weight, and it is zero; leave the layer out of targets")

    def mount(self) -> None:
        """See `Adapter`."""
        if isinstance(self.settings, LoraGaOptions) and not self.restoring:
            if self.settings.batches is None:
                raise WkvError("lora-ga starts from a gradient: pass batches=[...], a few batches of training data")
            self._gradients = mean_gradients(self.model, self.paths, self.settings.batches)
        super().mount()
        self.raw.mount()

    def unmount(self) -> None:
        """See `Adapter`."""
        super().unmount()
        self.raw.unmount()

    def set_active(self, active: bool) -> None:
        """See `Adapter`."""
        super().set_active(active)
        self.raw.set_active(active)

    def merge(self) -> None:
        """See `Adapter`."""
        super().merge()
        self.raw.merge()

    def unmerge(self) -> None:
        """See `Adapter`."""
        super().unmerge()
        self.raw.unmerge()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See `Adapter`: "<layer>.lora_A", "<layer>.lora_B", "<layer>.magnitude", "<parameter>.lora_A" and so on."""
        layers = {readable(name): parameter for name, parameter in super().named_parameters().items()}
        raw = ((path, side.named_parameters()) for path, side in self.raw.sides.items())
        return {**layers, **{f"{path}.{name}": parameter for path, named in raw for name, parameter in named}}

    def tensors(self) -> dict[str, Tensor]:
        """See `Adapter`: the parameters, and "<layer>.initial_A" and "<layer>.initial_B" of what was subtracted."""
        found = super().tensors()
        for path, side in self.sides.items():
            assert isinstance(side, PeftSide)
            found |= {f"{path}.{name}": value for name, value in side.start.named_buffers()}
        return found

    def parameter_rule(self, name: str, parameter: nn.Parameter) -> tuple[float, bool]:
        """See `Adapter`: with LoRA+, B learns faster."""
        if isinstance(self.settings, LoraPlusOptions) and "lora_B" in name.split("."):
            return self.settings.learning_rate_ratio, False
        return 1.0, False


@torch.no_grad()
def _scale_to(b: Tensor, weight: Tensor) -> None:
    """Give the first column of B the largest singular value of W as its length, and scale the others as much.

    That is LoRA-GA's scale "weight_svd". peft estimates the singular value at random, several per cent too small at
    worst.
    """
    length = b[:, 0].norm()
    if length > 0:
        b.mul_(torch.linalg.matrix_norm(weight, 2) / length)


def _check_number(name: str, value: Any, above: float, below: float | None = None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if below is None and not (number and value > above):
        raise WkvError(f"{name} must be a number above {above}, found {value!r}")
    if below is not None and not (number and above <= value < below):
        raise WkvError(f"{name} must be a number from {above} up to, not including, {below}, found {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise WkvError(f"{name} must be one of {', '.join(choices)}, found {value!r}")
