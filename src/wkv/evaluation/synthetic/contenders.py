"""Who is compared: a registered model with some options, in the frame that a benchmark asks for.

Shape letters: B batch, T time, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.head import TiedHead
from wkv.layers.language_model import LanguageModel
from wkv.layers.timeline import Timeline
from wkv.registry import create_config, create_model, entry
from wkv.state import LayerState

EMBEDDING_STD = 0.02
WORDS = {"true": True, "false": False, "none": None}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One model in a comparison.

    Args:
        model: its registered name.
        options: fields of its configuration.
        label: what tables and plots call it; by default the name and the options.
    """

    model: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            words = ", ".join(f"{key}={_written(value)}" for key, value in self.options.items())
            object.__setattr__(self, "label", f"{self.model} {words}".strip())

    @staticmethod
    def parse(text: str) -> Contender:
        """From text such as `rwkv7`, `rwkv7:a_scale=2,head_size=16` or `hybrid:layers=[0+2],label=mixed`.

        Values are numbers, `true`, `false`, `none`, words, or lists `[a+b]`.

        Raises:
            WkvError: for text of another form, an unknown model or an unknown option.
        """
        name, _, rest = text.strip().partition(":")
        options: dict[str, Any] = {}
        for word in rest.split(",") if rest else []:
            key, equals, value = word.partition("=")
            if not (equals and key.strip() and value.strip()):
                raise WkvError(f"{text!r}: expected NAME:OPTION=VALUE,OPTION=VALUE, found {word!r}")
            options[key.strip()] = value.strip() if key.strip() == "label" else parse_value(value.strip())
        label = options.pop("label", "")
        known = fields(name)
        for key in options:
            if key not in known:
                raise WkvError(f"{name} has no option {key!r}; one of {', '.join(sorted(known))}, label")
        return Contender(name, options, label)

    def build(
        self, vocab_size: int, defaults: Mapping[str, Any] | None = None, frame: Frame | None = None
    ) -> LanguageModel:
        """A new model.

        Args:
            vocab_size: of the task.
            defaults: sizes for the options that are not given; those that the model does not have are left out.
            frame: what the benchmark changes.

        Raises:
            WkvError: for options that the model refuses.
        """
        model = create_model(self.model, **self.all_options(vocab_size, defaults))
        (frame or Frame()).apply(model)
        return model

    def all_options(self, vocab_size: int, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The given options, filled up with `defaults`; checked, without building anything."""
        known = fields(self.model)
        filled = {key: value for key, value in (defaults or {}).items() if key in known}
        options = {**filled, **self.options, "vocab_size": vocab_size}
        create_config(self.model, **options)
        return options


def split_contenders(text: str) -> list[Contender]:
    """Several contenders with commas between; a piece such as `head_size=16` belongs to the one before it.

    Raises:
        WkvError: as `Contender.parse`, and for two of one label.
    """
    texts: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if texts and "=" in piece and ":" not in piece.partition("=")[0]:
            texts[-1] += ("," if ":" in texts[-1] else ":") + piece
        else:
            texts.append(piece)
    found = [Contender.parse(one) for one in texts]
    labels = [contender.label for contender in found]
    if not found or len(set(labels)) < len(labels):
        raise WkvError(f"models must be a list of different ones, such as rwkv4,rwkv7:a_scale=2; found {text!r}")
    return found


def fields(name: str) -> set[str]:
    """Options of a registered model that a contender may have; the vocabulary is the task's."""
    return {field.name for field in dataclasses.fields(entry(name).config_class) if field.init} - {"vocab_size"}


def parse_value(text: str) -> Any:
    """A number, a word, or a list `[a+b]`."""
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(word) for word in text[1:-1].split("+") if word]
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _written(value: Any) -> str:
    return f"[{'+'.join(map(_written, value))}]" if isinstance(value, list) else str(value)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a benchmark changes around the mixers, the same for every contender.

    Args:
        channel_mix: False replaces every channel mix by nothing ("the state mixer is the identity", Zoology).
        tied_head: the head is the embedding's matrix, which starts from N(0, 0.02^2). The models' own embedding,
            a thousand times smaller, leaves a tied head at chance.
        embedding_std: of the embedding's initial values; None: the model's own, or 0.02 with a tied head.
    """

    channel_mix: bool = True
    tied_head: bool = False
    embedding_std: float | None = None

    def apply(self, model: LanguageModel) -> None:
        """Change a new model."""
        if self.tied_head:
            tie_head(model)
        if self.embedding_std is not None:
            nn.init.normal_(model.emb.weight, std=self.embedding_std)
        if not self.channel_mix:
            remove_channel_mix(model)


def tie_head(model: LanguageModel, std: float = EMBEDDING_STD) -> None:
    """Let the logits be products with the embedding's matrix, and give that values of N(0, std^2)."""
    model.head = TiedHead(model.emb)
    nn.init.normal_(model.emb.weight, std=std)


class NoChannelMix(nn.Module):
    """In place of a channel mix: adds nothing and leaves its slots of the state as they are.

    Args:
        slots: their names.
    """

    def __init__(self, slots: tuple[str, ...]) -> None:
        super().__init__()
        self.slots = slots

    def forward(
        self, z_BTC: Tensor, carry: dict[str, Tensor], state: LayerState, timeline: Timeline
    ) -> tuple[Tensor, LayerState]:
        """Normed input [B, T, C] -> zeros, and the slots."""
        return torch.zeros_like(z_BTC), {name: state[name] for name in self.slots}

    def reset_parameters(self) -> None:
        """There are none."""


@torch.no_grad()
def remove_channel_mix(model: LanguageModel) -> None:
    """Replace each block's channel mix by `NoChannelMix`, and the norm before it by nothing."""
    slots: list[tuple[str, ...]] = []
    watched = [
        block.ffn.register_forward_hook(lambda module, inputs, output: slots.append(tuple(output[1])))
        for block in model.blocks
    ]
    try:  # which slots are a channel mix's own is seen where it returns them
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.emb.weight.device))
    finally:
        for hook in watched:
            hook.remove()
    for block, names in zip(model.blocks, slots, strict=True):
        block.ffn, block.ln2 = NoChannelMix(names), nn.Identity()


@torch.no_grad()
def state_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of what the model remembers of one sequence of `length` tokens, at four bytes a number.

    All layers, token shifts included; the slots of removed channel mixes and counters of tokens are left out. A cache
    of keys and values has the size it has after `length` tokens.
    """
    tokens = torch.zeros(1, length, dtype=torch.int64, device=model.emb.weight.device)
    _, state = model.forward_features(tokens)
    total = 0
    for block, layer in zip(model.blocks, state.layers, strict=True):
        unused = block.ffn.slots if isinstance(block.ffn, NoChannelMix) else ()
        total += sum(x.numel() for name, x in layer.items() if name not in unused and x.is_floating_point())
    return 4 * total
