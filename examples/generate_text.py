"""Continue a prompt, streaming.

python examples/generate_text.py                          # a new, untrained model: it writes noise
python examples/generate_text.py model.pth "Once upon"    # any checkpoint
"""

import sys

import wkv


def main(checkpoint: str | None = None, prompt: str = "Once upon a time") -> None:
    """Stream a continuation, then show what else is known about it."""
    if checkpoint:
        model = wkv.load_model(checkpoint)
    else:
        model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=64, num_layers=2, head_size=32)

    sampler = wkv.Sampler(temperature=1.0, top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2, seed=1)
    stream = wkv.generate(model, prompt, max_tokens=50, sampler=sampler, stream=True)
    print(prompt, end="")
    for piece in stream:
        print(piece, end="", flush=True)

    result = stream.result
    print(f"\n\n{len(result.tokens)} tokens, ended by {result.finish_reason!r}")

    # The state has read all of that; the next prompt continues it.
    more = wkv.generate(model, " And then", max_tokens=20, sampler=sampler, state=result.state)
    print(" And then" + more.text)


if __name__ == "__main__":
    main(*sys.argv[1:])
