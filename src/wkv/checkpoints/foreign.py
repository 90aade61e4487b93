"""Checkpoints that look like RWKV but are not one of ours: each is named, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Mapping

from wkv.checkpoints.archive import Archive, Stored, printable

_OFFICIAL = "load the official .pth or .safetensors it was made from"
_NOT_YET = "wkv has no model for it"

_PRE = r"\.ffnPre\."
# Pattern of a key -> (what the checkpoint is, what to do).
_KEYS = {
    r"^_(strategy|version|rescale_layer)$": ("converted by the `rwkv` package for one strategy", _OFFICIAL),
    r"\.qkv\.": ("RWKV-7b (an attention branch beside RWKV-7a)", _NOT_YET),
    r"\.enn\.": ("an RWKV-8 preview (rc00, vectors per token)", _NOT_YET),
    r"(^|[._])rosa([._]|$)": ("RWKV-8 with ROSA", _NOT_YET),
    r"^head_[qk]\.": ("an RWKV with the research option headQK", _NOT_YET),
    _PRE: ("an RWKV with the research option pre_ffn", _NOT_YET),
    r"\.tiny_": ("an RWKV with the research option of tiny attention", _NOT_YET),
    r"\.att\.(qq|kk|vv|oo)\b": ("RWKV-4a (tiny attention)", _NOT_YET),
    r"^(token_embd|blk\.\d+)\.": ("named as in GGUF", "load the .gguf file itself"),
    r"(^|\.)lora_[AB]\b|\.(bone(_[AB]|_block)?|disha|miss_block)$|^base_model\.": (
        "an adapter (LoRA or alike), not a model", "load the model, then mount it with wkv.tuning.import_adapter"),
    r"^rwkv\.(embeddings|blocks)\.": ("RWKV-4 in the names of transformers", "wkv cannot read them yet; " + _OFFICIAL),
    r"^(model\.)?(embeddings|embed_tokens|layers\.\d+)\.": (
        "named as in Hugging Face transformers or fla", "wkv cannot read that layout yet; " + _OFFICIAL),
    r"\.att\.x_x$": ("an early fla export with the token-shift vectors in one tensor", _OFFICIAL),
    r"\.att\.time_mix_(w1|w2|x|w)$|\.lora\.[01]$": (
        "in the .st layout of web-rwkv", "wkv cannot read it yet; " + _OFFICIAL),
}  # fmt: skip


def refuse_foreign(archive: Archive) -> None:
    """Raise `CheckpointError` if the keys belong to a layout or a variant that has no model here."""
    if "wkv_state" in archive.metadata:
        raise archive.error("a saved state, not a model; read it with wkv.State.load")
    perspectives = any(key.endswith("convert3.weight") for key in archive.tensors)  # `temporal` has that option
    for key in (*archive.extras, *archive.tensors):
        for pattern, (what, advice) in _KEYS.items():
            if re.search(pattern, key) and not (pattern == _PRE and perspectives):
                raise archive.error(f"{what}, as its key {printable(key)} shows; {advice}")


def refuse_variants(archive: Archive, name: str, tensors: Mapping[str, Stored]) -> None:
    """Raise `CheckpointError` for variants of known models whose keys are those of the model, but for some."""
    names = {key.partition(".att.")[2] for key in tensors}
    if name == "rwkv6" and "gate.weight" not in names:
        low_rank = names & {"gate_w1", "g1"}
        variant = "x060a (low-rank gate)" if low_rank else "x060b or x060c (no gate)"
        raise archive.error(f"the RWKV-6 research variant {variant}: it has no att.gate.weight; {_NOT_YET}")
    emb, down = (tensors[key].shape if key in tensors else () for key in ("emb.weight", "blocks.0.att.w1"))
    if name.startswith("rwkv7") and len(emb) == len(down) == 2 and down[0] != emb[1] == down[1]:
        what = "low-rank matrices are transposed, as in the .st layout of web-rwkv"
        raise archive.error(f"its {what} (blocks.0.att.w1 is {list(down)}); {_OFFICIAL}")
