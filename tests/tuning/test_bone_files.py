"""Adapter files of the Bone family from other programs: every format, what is ambiguous, what is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.ops.helpers import golden, max_error
from wkv.errors import CheckpointError, WkvError
from wkv.tuning.bone import VARIANTS, BoneSide, parameter_shapes
from wkv.tuning.bone_files import FORMATS, BoneFile, Origin, read_bone, write_bone

# A model of two layers: C = 16, F = 48.
SHAPES = {
    f"blocks.{i}.{name}": shape
    for i in range(2)
    for name, shape in {"att.key": (16, 16), "ffn.key": (48, 16), "ffn.value": (16, 48)}.items()
}
SQUARE = {name: shape for name, shape in SHAPES.items() if "att" in name}
RANK, MINI = 8, 4


def tensors(variant: str, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, dict[str, Tensor]]:
    """Random bfloat16 parameters for every layer."""
    torch.manual_seed(1)
    mini = MINI if variant == "miss-mini" else None
    return {
        layer: {name: torch.randn(s).bfloat16() for name, s in parameter_shapes(variant, *sizes, RANK, mini).items()}
        for layer, sizes in shapes.items()
    }


def adapter(variant: str, shapes: dict[str, tuple[int, int]] = SHAPES, origin: Origin | None = None) -> BoneFile:
    options = {"rank": RANK, "mini_rank": MINI} if variant == "miss-mini" else {"rank": RANK}
    return BoneFile(variant, tensors(variant, shapes), options, {}, origin)


def same(found: BoneFile, expected: BoneFile) -> bool:
    if (found.variant, found.options) != (expected.variant, expected.options) or list(found.layers) != list(
        expected.layers
    ):
        return False
    pairs = [(found.others, expected.others)]
    pairs += [(found.layers[layer], expected.layers[layer]) for layer in found.layers]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a) for a, b in pairs
    )


def stored(path: Path) -> dict[str, Tensor]:
    """Everything in a file or a folder of peft."""
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(path: Path, content: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def peft_folder(path: Path, content: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in content.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "MISS", "r": RANK, **config}))
    return path


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("form", "variant"), [(f, v) for f in FORMATS for v in FORMATS[f]])
def test_written_and_read(form: str, variant: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / ("adapter" if form.startswith("peft") else f"adapter{suffix}")
    made = adapter(variant)
    write_bone(path, made, form)
    for found in (read_bone(path, variant), read_bone(path, shapes=SHAPES)):
        assert same(found, made)
        assert found.origin is not None
        assert found.origin.format == form
    write_bone(path.with_name(f"again{path.suffix}"), found)
    assert same(read_bone(path.with_name(f"again{path.suffix}"), variant), made)
    before, after = stored(path), stored(path.with_name(f"again{path.suffix}"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_keys_and_shapes_of_the_formats(tmp_path: Path) -> None:
    write_bone(tmp_path / "a.pth", adapter("bone-row"), "bone")
    assert stored(tmp_path / "a.pth")["blocks.0.ffn.value.bone"].shape == (6, 8, 8)
    write_bone(tmp_path / "b.pth", adapter("miss"), "disha")
    assert stored(tmp_path / "b.pth")["blocks.0.ffn.key.disha"].shape == (8, 48)
    write_bone(tmp_path / "c", adapter("bone-col"), "peft-bone")
    assert stored(tmp_path / "c")["base_model.model.blocks.1.ffn.key.bone_block"].shape == (6, 8, 8)
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["peft_type"] == "BONE"
    write_bone(tmp_path / "d", adapter("miss-mini"), "peft-miss")
    config = json.loads((tmp_path / "d" / "adapter_config.json").read_text())
    assert (config["r"], config["mini_r"], config["init_weights"]) == (8, 4, "mini")
    write_bone(tmp_path / "e.pth", adapter("bone-ab"), "bone")
    assert {"blocks.0.att.key.bone_A", "blocks.0.att.key.bone_B"} <= stored(tmp_path / "e.pth").keys()


def test_the_first_form_of_bone(tmp_path: Path) -> None:
    """Blocks one below the other in a matrix [O, r]."""
    content = {f"{layer}.bone": torch.randn(sizes[0], RANK) for layer, sizes in SHAPES.items()}
    path = write(tmp_path / "first.pth", content)
    found = read_bone(path, shapes=SHAPES)
    assert found.variant == "bone-col"
    assert torch.equal(found.layers["blocks.0.ffn.key"]["B"][2], content["blocks.0.ffn.key.bone"][16:24])
    write_bone(tmp_path / "again.pth", found)
    again = stored(tmp_path / "again.pth")
    assert all(torch.equal(again[key], content[key]) for key in content)
    assert same(read_bone(path, "bone-col"), found)


def test_what_was_trained_along_is_kept(tmp_path: Path) -> None:
    content = {f"{layer}.disha": torch.randn(RANK, o) for layer, (o, _) in SHAPES.items()}
    content |= {"blocks.0.ln1.weight": torch.ones(16), "steps": torch.tensor(3)}
    found = read_bone(write(tmp_path / "rwkv-0.pth", content))
    assert found.variant == "miss"
    assert found.others.keys() == {"blocks.0.ln1.weight", "steps"}
    write_bone(tmp_path / "again.pth", found)
    assert stored(tmp_path / "again.pth").keys() == content.keys()


def test_prefixes(tmp_path: Path) -> None:
    blocks = torch.randn(2, RANK, RANK)
    for prefix in ("model.", "base_model.model.", "base_model.model.model."):
        content = {f"{prefix}blocks.0.att.key.bone": blocks, f"{prefix}blocks.1.att.key.bone": blocks}
        found = read_bone(write(tmp_path / "prefixed.pth", content), "bone-row")
        assert list(found.layers) == ["blocks.0.att.key", "blocks.1.att.key"]
        write_bone(tmp_path / "again.pth", found)
        assert stored(tmp_path / "again.pth").keys() == content.keys()
    # The names of another model are left to the caller.
    content = {"base_model.model.model.layers.0.self_attn.q_proj.bone_block": blocks}
    found = read_bone(write(tmp_path / "other.pth", content))
    assert list(found.layers) == ["model.layers.0.self_attn.q_proj"]


# ---------------------------------------------------------------- what a file leaves open


def test_ambiguous_files_are_refused(tmp_path: Path) -> None:
    write_bone(tmp_path / "square.pth", adapter("bone-row", SQUARE), "bone")
    for shapes in (None, SQUARE):
        with pytest.raises(CheckpointError, match=r"can be bone-col or bone-row; pass variant="):
            read_bone(tmp_path / "square.pth", shapes=shapes)
    assert read_bone(tmp_path / "square.pth", "bone-col", SQUARE).variant == "bone-col"
    assert read_bone(tmp_path / "square.pth", "bone-row", SQUARE).variant == "bone-row"

    content = {"base_model.model.blocks.0.att.key.miss_block": torch.randn(RANK, 16)}
    with pytest.raises(CheckpointError, match="can be miss or miss-mini"):
        read_bone(write(tmp_path / "bare.pth", content))
    assert read_bone(tmp_path / "bare.pth", shapes=SQUARE).variant == "miss"

    square = {"blocks.0.att.key.bone": torch.randn(16, 16)}
    with pytest.raises(CheckpointError, match="can be bone-col or miss"):
        read_bone(write(tmp_path / "matrix.pth", square), shapes=SQUARE)
    assert read_bone(tmp_path / "matrix.pth", "miss").options == {"rank": 16}


@pytest.mark.parametrize(
    ("init", "variant"), [(True, "miss"), (False, "miss"), ("bat", "bone-col"), ("mini", "miss-mini")]
)
def test_the_configuration_decides(init: bool | str, variant: str, tmp_path: Path) -> None:
    content = {f"{layer}.miss_block": v for layer, own in tensors(variant, SQUARE).items() for v in own.values()}
    folder = peft_folder(tmp_path / "peft", content, init_weights=init, mini_r=MINI, miss_dropout=0.1)
    found = read_bone(folder)
    assert same(found, adapter(variant, SQUARE))
    assert same(read_bone(folder / "adapter_model.safetensors"), found)
    assert found.origin is not None
    assert found.origin.config is not None
    assert found.origin.config["miss_dropout"] == 0.1
    write_bone(tmp_path / "again", found)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "again")]
    assert configs[0] == configs[1]
    with pytest.raises(CheckpointError, match=f"which is {variant}, not bone-row"):
        read_bone(folder, "bone-row")


def test_weights_in_a_bin_file(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({"base_model.model.blocks.0.att.key.bone_block": torch.ones(RANK, 16)}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "BONE", "r": 8, "init_weights": true}')
    assert read_bone(folder).variant == "miss"


# ---------------------------------------------------------------- what is wrong


def test_a_file_of_another_variant_is_refused(tmp_path: Path) -> None:
    write_bone(tmp_path / "col.pth", adapter("bone-col"), "bone")
    expected = r"blocks.0.ffn.key.bone has shape \[6, 8, 8\], which is not bone-row .*48 outputs and 16 inputs"
    with pytest.raises(CheckpointError, match=expected):
        read_bone(tmp_path / "col.pth", "bone-row", SHAPES)
    with pytest.raises(CheckpointError, match=r"blocks.0.att.key.bone has shape \[2, 8, 8\], which is not miss "):
        read_bone(tmp_path / "col.pth", "miss")
    with pytest.raises(WkvError, match="'bat' is not a variant"):
        read_bone(tmp_path / "col.pth", "bat")
    narrow = {name: (o, 12) for name, (o, _) in SHAPES.items()}
    with pytest.raises(CheckpointError, match="which is not bone-col in this format on a layer with 16 outputs and 12"):
        read_bone(tmp_path / "col.pth", "bone-col", narrow)


BLOCKS = torch.zeros(2, RANK, RANK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.weight": torch.ones(2)}, r"no adapter of the Bone family: .*found a.weight"),
        ({"x.bone": torch.zeros(2, 8, 4)}, r"x.bone has shape \[2, 8, 4\]"),
        ({"x.disha": torch.zeros(2, 8, 8, 8)}, "x.disha has shape"),
        ({"x.bone": torch.zeros(8)}, r"x.bone has shape \[8\]"),
        ({"x.bone": BLOCKS.long()}, "x.bone has type int64"),
        ({"x.bone": BLOCKS, "y.disha": BLOCKS}, "x.bone and y.disha .* format differs"),
        ({"x.disha": BLOCKS, "base_model.model.y.disha": BLOCKS}, "prefix differs"),
        ({"x.disha": BLOCKS, "y.disha": torch.zeros(2, 4, 4)}, r"y.disha has \{'rank': 4\}.* one rank"),
        ({"x.disha": BLOCKS, "y.disha": torch.zeros(8, 16)}, "y.disha has shape .* not bone-row in this format"),
        ({"x.bone_A": BLOCKS, "y.bone_B": BLOCKS}, "x needs bone_A and bone_B of one shape"),
        ({"x.bone_A": BLOCKS, "x.bone_B": torch.zeros(3, 8, 8)}, "x needs bone_A and bone_B of one shape"),
        ({"x.bone": torch.zeros(2, 0, 0)}, "x.bone has shape"),
        ({"x.bone": torch.zeros(16, 0)}, "x.bone has shape"),
    ],
)
def test_files_that_are_wrong(content: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_bone(write(tmp_path / "wrong.pth", content))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORA"}, "an adapter of type 'LORA', expected BONE or MISS"),
        ({"init_weights": "bat"}, r"miss_block has shape \[8, 16\], which is not bone-col"),
        ({"init_weights": "odd"}, "init_weights 'odd'"),
        ({"init_weights": 1}, "init_weights 1"),
        ({"init_weights": ["bat"]}, r"init_weights \['bat'\]"),
        ({"r": 16}, "says r 16, but .* has 8"),
        ({"init_weights": "mini", "mini_r": 8}, "says mini_r 8, but .* has 16"),
    ],
)
def test_configurations_that_contradict(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", {"blocks.0.att.key.miss_block": torch.zeros(RANK, 16)}, **config)
    with pytest.raises(CheckpointError, match=message):
        read_bone(folder)


def test_damaged_files(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", {"blocks.0.att.key.miss_block": torch.zeros(RANK, 16)})
    for text, message in (("{", "cannot be read as JSON"), ("[]", "holds list")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_bone(folder)
    with pytest.raises(CheckpointError, match="no such file"):
        read_bone(tmp_path / "nothing.pth")
    path = write(tmp_path / "cut.safetensors", {"x.bone": BLOCKS})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_bone(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for variant, form, message in (
        ("bone-row", "peft-miss", "cannot hold bone-row; choose bone or disha"),
        ("bone-ab", "disha", "choose bone"),
        ("miss", None, "format None"),
        ("miss", "peft", "format 'peft' cannot hold miss; choose bone or disha or peft-bone or peft-miss"),
    ):
        with pytest.raises(WkvError, match=message):
            write_bone(tmp_path / "x.pth", adapter(variant), form)
    with pytest.raises(WkvError, match=r"must end in .pth or .safetensors, found .gguf"):
        write_bone(tmp_path / "x.gguf", adapter("miss"), "disha")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_bone(tmp_path / "missing" / "x.pth", adapter("miss"), "disha")
    assert list(tmp_path.iterdir()) == []


def test_another_format_than_the_origin(tmp_path: Path) -> None:
    write_bone(tmp_path / "a.pth", adapter("miss"), "disha")
    write_bone(tmp_path / "b", read_bone(tmp_path / "a.pth"), "peft-miss")
    found = read_bone(tmp_path / "b")
    assert same(found, adapter("miss"))
    assert "base_model.model.blocks.0.att.key.miss_block" in stored(tmp_path / "b")


# ---------------------------------------------------------------- with peft itself


def peft_model(module: nn.Module, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(module, peft.MissConfig(r=RANK, **config))


@pytest.mark.parametrize("variant", ["bone-col", "miss", "miss-mini"])
def test_folders_of_peft(variant: str, tmp_path: Path) -> None:
    """Theirs in ours and ours in theirs give the same outputs."""
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(16, 48, bias=False)), torch.randn(5, 16)
    base: Any = nn.Linear(16, 48, bias=False).requires_grad_(False)
    base.load_state_dict(model[0].state_dict())
    init = {"bone-col": "bat", "miss": True, "miss-mini": "mini"}[variant]
    theirs = peft_model(model, init_weights=init, mini_r=MINI, target_modules=["0"])
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    found = read_bone(tmp_path / "theirs")
    assert found.variant == variant
    side = BoneSide(variant, 48, 16, **found.options)
    side.load_state_dict(found.layers["0"])
    assert max_error(side(x, base), theirs(x)) < 2e-6

    write_bone(tmp_path / "ours", BoneFile(variant, found.layers, found.options), "peft-miss")
    plain = nn.Sequential(nn.Linear(16, 48, bias=False))
    plain[0].load_state_dict(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = pytest.importorskip("peft").PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert torch.equal(loaded(x), theirs(x))


def test_golden_adapters_go_through_every_format(tmp_path: Path) -> None:
    vectors = golden("bone", "bone_family")
    names = {"bone-col": "bone_col.bone", "bone-row": "bone_row.bone", "miss": "miss.D", "miss-mini": "miss_mini.D"}
    for variant, name in names.items():
        value, weight = vectors[f"tall.{name}"], vectors["tall.W"]
        options = {"rank": 8, "mini_rank": 12} if variant == "miss-mini" else {"rank": 8}
        own = {"B" if value.ndim == 3 else "D": value}
        for form in (form for form in FORMATS if variant in FORMATS[form]):
            path = tmp_path / (f"{variant}-{form}" + ("" if form.startswith("peft") else ".pth"))
            write_bone(path, BoneFile(variant, {"blocks.0.att.key": own}, options), form)
            found = read_bone(path, shapes={"blocks.0.att.key": (48, 24)})
            side = BoneSide(found.variant, 48, 24, **found.options)
            side.load_state_dict(found.layers["blocks.0.att.key"])
            base = nn.Linear(24, 48, bias=False).requires_grad_(False)
            base.load_state_dict({"weight": weight})
            assert max_error(side(vectors["tall.x"], base), vectors[f"tall.{name.split('.')[0]}.y"]) <= 2e-6


def test_formats_cover_all_variants() -> None:
    assert {variant for variants in FORMATS.values() for variant in variants} == set(VARIANTS)
