"""Store a model in 8 or 4 bits, and measure what that changes.

python examples/quantize_model.py                               # a new, untrained model
python examples/quantize_model.py model.pth small.safetensors   # any checkpoint
"""

import sys
from pathlib import Path

import wkv
from wkv.quantization import compare_models, default_policy, quantize_model, resident_bytes

TEXT = "We hold these truths to be self-evident, that all men are created equal. " * 4


def main(checkpoint: str | None = None, target: str = "model-int4.safetensors") -> None:
    """Quantise, compare, save, load and generate."""
    if checkpoint:
        model = wkv.load_model(checkpoint)
    else:
        model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=64, num_layers=2, head_size=32)

    # Large matrices in 4 bits, embedding and head in 8; here the head in 16 instead.
    policy = default_policy(4).changed({"head": "bfloat16"})
    models = {"8 bits": quantize_model(model, 8), "4 bits": quantize_model(model, 4)}
    models["4 bits, head bfloat16"] = quantize_model(model, policy=policy)

    found = compare_models(model, models, [TEXT])
    print(f"float: {resident_bytes(model):,} bytes, {found.bits_per_byte:.4f} bits per byte")
    for name, each in found.others.items():
        print(f"{name}: {resident_bytes(models[name]):,} bytes, {each.bits_per_byte:.4f} ({each.change:+.3%})")

    wkv.save_model(models["4 bits"], target)
    small = wkv.load_model(target)  # the weights stay in the mapped file
    print(f"{target}: {Path(target).stat().st_size:,} bytes")
    print(wkv.generate(small, "We hold these", max_tokens=20, seed=1).text)


if __name__ == "__main__":
    main(*sys.argv[1:])
