"""The fine-tuning methods: canonical name -> the adapter class, and what each is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from wkv.errors import WkvError
from wkv.tuning.adapter import Adapter


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        place: module and class of its adapter.
        learning_rate: a start for small models, at the highest point of the schedule.
        about: one line.
    """

    place: tuple[str, str]
    learning_rate: float
    about: str

    def adapter_class(self) -> type[Adapter]:
        """The class; its module is imported now."""
        module, name = self.place
        found: type[Adapter] = getattr(importlib.import_module(module), name)
        return found


_BONE, _PEFT = ("wkv.tuning.bone_adapter", "BoneAdapter"), ("wkv.tuning.lora", "PeftAdapter")
_STATE = ("wkv.tuning.state", "StateAdapter")
_KERNEL = ("wkv.tuning.kernel_state", "KernelStateAdapter")

METHODS = {
    "bone-row": Method(_BONE, 1e-3, "Bone: the weight guides one r x r block per input block; never copies a weight"),
    "bone-col": Method(_BONE, 1e-3, 'Bone: one r x r block per output block (the first "Bone", peft\'s "bat")'),
    "bone-ab": Method(_BONE, 1e-3, "Bone with separate multiplicative and additive blocks (an ablation)"),
    "miss": Method(_BONE, 1e-3, "MiSS: one r x O matrix shared by all input blocks; exact as LoRA"),
    "miss-mini": Method(_BONE, 1e-3, "MiSS with the matrix tiled along the outputs, too"),
    "lora": Method(_PEFT, 1e-3, "LoRA: W + s B A (peft)"),
    "rslora": Method(_PEFT, 1e-3, "LoRA with the scale alpha / sqrt(r) (peft)"),
    "dora": Method(_PEFT, 1e-3, "LoRA of the direction, and a magnitude per output (peft)"),
    "lora-plus": Method(_PEFT, 1e-3, "LoRA whose B learns faster than A (LoRA+)"),
    "pissa": Method(_PEFT, 1e-3, "LoRA that starts from the principal part of W (peft)"),
    "olora": Method(_PEFT, 1e-3, "LoRA that starts from the QR decomposition of W (peft)"),
    "lora-ga": Method(_PEFT, 1e-3, "LoRA that starts from the gradient of W on a few batches (peft)"),
    "peft": Method(("wkv.tuning.any_peft", "AnyPeftAdapter"), 1e-3, "any other method of peft, by its config"),
    "state": Method(_STATE, 0.3, "state tuning: the initial wkv states"),
    "fullstate": Method(_STATE, 0.3, "state tuning with the initial token-shift states"),
    "state-kernel": Method(_KERNEL, 0.3, "an upscaled kernel state beside each head's own (our reconstruction)"),
}

# What others call methods of ours, where a name means one thing only.
_ALIASES = {"full-state": "fullstate", "lora+": "lora-plus", "miss_mini": "miss-mini"}
_AMBIGUOUS = {
    "bone": 'the guided form ("bone-col", "bone-row") in the papers of 2024, "miss" in RWKV-PEFT and peft since',
    "bat": '"bone-col" in peft and "bone-row" in RWKV-PEFT',
    "disha": '"miss" or "bone-row", by the mode in RWKV-PEFT',
}


def canonical(name: str) -> str:
    """The canonical name of a method.

    Raises:
        WkvError: if it is unknown, or means different things in different programs.
    """
    if not isinstance(name, str):
        raise WkvError(f"a method is named by a text, found {type(name).__name__}")
    key = name.strip().lower()
    if key in _AMBIGUOUS:
        raise WkvError(f"{name!r} is {_AMBIGUOUS[key]}; say which you mean")
    for candidate in (key, key.replace("_", "-"), _ALIASES.get(key, "")):
        if candidate in METHODS:
            return candidate
    raise WkvError(f"method {name!r} is unknown; one of {', '.join(METHODS)}")
