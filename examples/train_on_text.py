"""Train a small RWKV-7 on your own text: python examples/train_on_text.py book.txt [run folder] [key=value ...]."""

import sys

import wkv
from wkv.training import load_recipe, train


def main(source: str, out: str = "runs/my_text", *changes: str) -> None:
    """The demo recipe on `source` (a text file or a folder of them), then a first sentence by the model."""
    result = train(load_recipe("demo", [f"data.source='{source}'", *changes]), out)
    print(f"{result.bits_per_byte:.3f} bits per byte on held-out text")
    print(wkv.generate(wkv.load_model(result.model), "The ", max_tokens=50, seed=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
