"""Method "peft": any method of peft for linear layers, by its own config.

>>> adapter = wkv.tuning.create("peft", model, config=peft.HRAConfig(r=8), targets=["att.key", "ffn"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.adapter import WeightAdapter
from wkv.tuning.peft_side import PeftSide, import_peft, make_layer, readable
from wkv.tuning.side import Side, layer_weight

# `peft_type` of the methods that work on one linear layer at a time and merge into its weight; all are tested.
TYPES = (
    "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LOHA", "LOKR", "LORA",
    "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "WAVEFT",
)  # fmt: skip
# Settings that speak of the layers of a whole model: peft sees one layer at a time here.
_OF_MODELS = (
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform",
    "layers_pattern", "layer_replication", "rank_pattern", "alpha_pattern", "trainable_token_indices",
)  # fmt: skip


class AnyPeftAdapter(WeightAdapter):
    """An adapter that peft describes. Files hold the config and what is trained, as those of peft do.

    Whether the start is the model itself, is up to the config.

    Options:
        config: a `peft.PeftConfig`, or its dictionary. It does not say which layers, nor anything about some of them.
        targets: see `wkv.tuning.mounting.choose_layers`.
    """

    def __init__(
        self,
        model: LanguageModel,
        method: str,
        name: str,
        config: Any = None,
        targets: str | Sequence[str] | None = None,
    ) -> None:
        self.config = _config(config)
        options = {"config": _plain(self.config.to_dict()), "targets": targets}
        super().__init__(model, method, name, options, targets)

    def build_side(self, path: str, layer: Any) -> Side:
        """See `WeightAdapter`."""
        weight = layer_weight(layer)
        made = make_layer(self.config, weight)
        if not torch.equal(made.get_base_layer().weight, weight):
            kind = self.options["config"].get("init_lora_weights")
            raise WkvError(f"peft changes the weight to start with ({kind}); pissa, olora and lora-ga are methods here")
        return PeftSide(made, layer)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See `Adapter`: what peft trains, under its names."""
        sides = ((path, side) for path, side in self.sides.items() if isinstance(side, PeftSide))
        return {f"{path}.{readable(name)}": value for path, side in sides for name, value in side.trained.items()}


def _config(config: Any) -> Any:
    peft = import_peft()
    if isinstance(config, dict):
        try:
            config = peft.PeftConfig.from_peft_type(**config)
        except (KeyError, TypeError, ValueError) as error:
            raise WkvError(f"config is not one of peft: {error}") from error
    if not isinstance(config, peft.PeftConfig):
        raise WkvError(f"pass config=, a config of peft such as peft.HRAConfig(r=8), found {type(config).__name__}")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in TYPES:
        raise WkvError(f"{kind} does not work on one linear layer at a time and merge into it; these do: {TYPES}")
    for field in _OF_MODELS:
        if getattr(config, field, None):
            raise WkvError(f"config sets {field}; leave that out, and say with targets= which layers are meant")
    if config.inference_mode or getattr(config, "bias", "none") != "none":
        raise WkvError("config asks for inference_mode or for biases to be trained; leave that out")
    return config


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The config as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=_listed))
    return found


def _listed(value: Any) -> Any:
    if isinstance(value, set | tuple):
        return sorted(value)
    raise WkvError(f"config holds a {type(value).__name__}, which files cannot keep")
