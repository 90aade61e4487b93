"""Train on a document longer than memory: segment after segment, with the state carried on.

python examples/long_document.py             # a made-up log of 20,000 bytes
python examples/long_document.py book.txt    # any text file
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import wkv
from wkv.training import create_optimizer
from wkv.training.segments import context_length_at, segmented_backward

SEGMENT = 128


def main(source: str | None = None) -> None:
    """Train on stretches of a mapped file that grow longer and longer, then compare the two modes."""
    torch.manual_seed(0)
    model = wkv.create_model("rwkv7", vocab_size=256, hidden_size=64, num_layers=2, head_size=32)
    optimizer = create_optimizer(model, learning_rate=3e-3, weight_decay=0.01)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source) if source else Path(folder, "log.txt")
        if not source:
            path.write_text("\n".join(f"entry {i}: all is well" for i in range(800)))
        document = np.memmap(path, np.uint8, "r")[None]  # [1, T]; only the segment at hand is read
        train(model, optimizer, document)
        compare(model, document[:, :2000])
        del document


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, document: np.ndarray) -> None:
    """Once through the document; every step goes on from the state in which the step before ended."""
    position, step, state = 0, 0, None
    while position < document.shape[1] - 1:
        length = context_length_at(step, start=256, final=2048, steps=10)
        tokens = document[:, position : position + length + 1]
        optimizer.zero_grad()
        result = segmented_backward(model, tokens[:, :-1], tokens[:, 1:], segment=SEGMENT, state=state)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state, position, step = result.state, position + tokens.shape[1] - 1, step + 1
        print(f"step {step}, {result.tokens} tokens of context: loss {result.loss:.3f}")


def compare(model: torch.nn.Module, document: np.ndarray) -> None:
    """Gradients that end at the borders of segments, and exact ones, with the same memory for activations."""
    gradients = {}
    for mode in ("truncated", "exact"):
        model.zero_grad()
        result = segmented_backward(model, document[:, :-1], document[:, 1:], segment=SEGMENT, mode=mode)
        gradients[mode] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        print(f"{mode}: loss {result.loss:.6f}, gradient norm {gradients[mode].norm():.4f}")
    angle = torch.cosine_similarity(gradients["truncated"], gradients["exact"], dim=0)
    print(f"cosine of the two gradients: {angle:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
