"""The Bone family as adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wkv.layers.language_model import LanguageModel
from wkv.tuning.adapter import WeightAdapter
from wkv.tuning.bone import BoneSide
from wkv.tuning.options import check_rank
from wkv.tuning.side import Side


class BoneAdapter(WeightAdapter):
    """Bone ("bone-row", "bone-col", "bone-ab") and MiSS ("miss", "miss-mini"); see `wkv.tuning.bone`.

    Options:
        rank: r, side of the blocks (Bone) or rows of the shared matrix (MiSS); 64 by default. About twice the rank of a
            LoRA with as many parameters.
        mini_rank: of "miss-mini": columns of the matrix; must divide the outputs of every target.
        targets: see `wkv.tuning.mounting.choose_layers`.
    """

    def __init__(
        self,
        model: LanguageModel,
        method: str,
        name: str,
        rank: int = 64,
        mini_rank: int | None = None,
        targets: str | Sequence[str] | None = None,
    ) -> None:
        options = {"rank": check_rank(rank), "mini_rank": mini_rank, "targets": targets}
        super().__init__(model, method, name, options, targets)

    def build_side(self, path: str, layer: Any) -> Side:
        """See `WeightAdapter`."""
        sizes = layer.out_features, layer.in_features
        return BoneSide(self.method, *sizes, self.options["rank"], self.options["mini_rank"])
