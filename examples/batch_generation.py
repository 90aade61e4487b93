"""Continue several prompts of different lengths together: the same result as one by one, only faster.

python examples/batch_generation.py               # a new, untrained model
python examples/batch_generation.py model.pth     # any checkpoint
"""

import sys

import wkv


def main(checkpoint: str | None = None) -> None:
    """Generate for all prompts at once, and compare with one of them alone."""
    if checkpoint:
        model = wkv.load_model(checkpoint)
    else:
        model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=64, num_layers=2, head_size=32)

    prompts = ["The capital of France is", "Two plus two is", "RWKV is a"]
    results = wkv.generate(model, prompts, max_tokens=30, seed=7, stop=["\n"], logprobs=3)
    for prompt, result in zip(prompts, results, strict=True):
        mean = sum(result.logprobs) / max(1, len(result.logprobs))
        print(f"{prompt}{result.text!r}  ({result.finish_reason}, mean log-probability {mean:.2f})")

    alone = wkv.generate(model, prompts[1], max_tokens=30, seed=7, stop=["\n"])
    print("the same alone:", alone.tokens == results[1].tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
