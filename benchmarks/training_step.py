"""Where the time of a training step goes, by operator.

    python benchmarks/training_step.py [--out FILE] [--repeats N] [--threads N]

Every part of an RWKV-7 training step runs forward and backward on its own, with the model's modules and shapes, in
rounds that alternate with whole steps; reported are medians over rounds. "rest" is what the whole step takes beyond the
sum of its parts: adding gradients up, residual sums, and Python.

Then steps of the training loop (log, progress bar, schedule, guard, accelerate) alternate with a bare loop of the same
forward pass, loss, backward pass, clipping and update: reported is the throughput of the one over that of the other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import wkv
from wkv.data import TokenStore, UniformWindows
from wkv.layers.channel_mix import squared_relu
from wkv.layers.timeline import Timeline
from wkv.ops import wkv7
from wkv.speed.evidence import evidence
from wkv.training import create_optimizer, head_loss, next_token_loss
from wkv.training.display import Display
from wkv.training.log import RunLog
from wkv.training.loop import Trainer
from wkv.training.recipe import TrainRecipe

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/training_step.json"
SHAPES = {
    "4 x 192, T=128, B=8": {"num_layers": 4, "hidden_size": 192, "vocab_size": 2048, "length": 128, "batch": 8},
    "6 x 256, T=512, B=8": {"num_layers": 6, "hidden_size": 256, "vocab_size": 4096, "length": 512, "batch": 8},
}
Part = Callable[[], object]


def main() -> None:
    """Measure all shapes, print tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tables = {}
    for name, shape in SHAPES.items():
        tables[name] = measure(shape, options.repeats)
        show(name, tables[name])
    throughput = loop_throughput(options.repeats)
    print(f"\nthe training loop has {throughput['ratio']:.1%} of the throughput of a bare loop")
    result = {"what": "milliseconds of a training step by operator, forward + backward", "shapes": tables}
    result["loop_throughput"] = throughput
    result |= {"repeats": options.repeats, "seed": 0, **evidence(__file__, sys.argv[1:])}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, options.out)


def measure(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Median milliseconds of every part (all layers together), of the whole step, and tokens per second."""
    torch.manual_seed(0)
    sizes = {key: shape[key] for key in ("num_layers", "hidden_size", "vocab_size")}
    model = wkv.create_model("rwkv7", **sizes)
    parts = step_parts(model, shape)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for round_ in range(repeats + 2):
        for name, (run, count) in parts.items():
            milliseconds = timed(run) * 1e3 * count
            if round_ > 1:  # the first two rounds warm up
                times[name].append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    whole = medians.pop("whole step")
    # Timed as forward and as forward + backward; reported as forward and backward.
    medians["wkv7 backward"] -= medians["wkv7 forward"]
    medians["rest"] = whole - sum(medians.values())
    tokens = shape["batch"] * shape["length"]
    return {
        "milliseconds": {name: round(value, 2) for name, value in medians.items()},
        "share": {name: round(value / whole, 3) for name, value in medians.items()},
        "whole_step_ms": round(whole, 1),
        "tokens_per_second": round(tokens / whole * 1e3),
        "parameters": model.num_parameters,
    }


def loop_throughput(repeats: int) -> dict[str, Any]:
    """Throughput of the loop over that of a bare one: the median over pairs of 3 steps each, and all pairs."""
    torch.manual_seed(0)
    shape = SHAPES["4 x 192, T=128, B=8"]
    model = wkv.create_model("rwkv7", **{key: shape[key] for key in ("num_layers", "hidden_size", "vocab_size")})
    recipe = TrainRecipe(steps=10**6, weight_decay=0.1, guard=3, spike=100.0)
    store = TokenStore(torch.randint(shape["vocab_size"], (100_000,)).numpy(), np.zeros(1, np.int64))
    console = Console(file=io.StringIO(), force_terminal=True)
    ratios = []
    with tempfile.TemporaryDirectory() as folder, Display(console) as display:
        trainer = Trainer(recipe, model, UniformWindows(store, 128, 8, 0), Path(folder))
        with RunLog(Path(folder) / "log.csv") as log:
            for _ in range(repeats + 2):
                bare = timed(lambda: bare_steps(trainer, 3))
                ratios.append(bare / timed(lambda: logged_steps(trainer, log, display, 3)))
    pairs = [round(ratio, 4) for ratio in ratios[2:]]  # the first two warm up
    return {"ratio": statistics.median(pairs), "pairs": pairs}


def bare_steps(trainer: Trainer, steps: int) -> None:
    """Forward, backward, clip and update, and nothing else."""
    model = trainer.plain_model
    for _ in range(steps):
        batch = trainer.sampler.next_batch()
        hidden, _ = model.forward_features(batch.inputs)
        loss = head_loss(hidden, model.head, batch.targets)
        trainer.plain_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
        trainer.plain_optimizer.step()


def logged_steps(trainer: Trainer, log: RunLog, display: Display, steps: int) -> None:
    """What `Trainer.run` does between evaluations."""
    for _ in range(steps):
        trainer.report(log, display, trainer.step())


def timed(run: Part) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step_parts(model: Any, shape: dict[str, int]) -> dict[str, tuple[Part, int]]:
    """Every part of a step and how often a step runs it."""
    batch, length, layers = shape["batch"], shape["length"], shape["num_layers"]
    tokens = torch.randint(shape["vocab_size"], (batch, length + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    optimizer = create_optimizer(model, 1e-3, 0.1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    x = torch.randn(batch, length, shape["hidden_size"], requires_grad=True)

    def whole() -> None:
        loss = next_token_loss(model(inputs).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        update()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return {
        "embedding and ln0": (lambda: both_ways(model.blocks[0].ln0(model.emb(inputs))), 1),
        **{name: (part, layers) for name, part in block_parts(model.blocks[1], x).items()},
        "ln_out": (lambda: both_ways(model.ln_out(x)), 1),
        "head and loss": (lambda: both_ways(next_token_loss(model.head(x), targets)), 1),
        "whole step": (whole, 1),  # before "clip and optimizer", which needs gradients
        "clip and optimizer": (update, 1),
    }


def block_parts(block: Any, x: Tensor) -> dict[str, Part]:
    """The parts of one layer on inputs x [B, T, C]."""
    att, ffn = block.att, block.ffn
    heads = (*x.shape[:2], att.num_heads, att.head_size)
    recurrence = recurrence_inputs(heads)
    projections = (att.receptance, att.key, att.value, att.output)
    return {
        "token shift and lerps": lambda: both_ways(*lerps(block, x)),
        "projections r, k, v, output": lambda: both_ways(*(linear(x) for linear in projections)),
        "low-rank maps w, a, v, g": lambda: both_ways(*low_rank_maps(att, x)),
        "keys, rates, bonus, gate": lambda: both_ways(*elementwise(att, x, heads)),
        "wkv7 forward": lambda: wkv7(*recurrence),
        "wkv7 backward": lambda: both_ways(wkv7(*recurrence)[0]),
        "norms ln1, ln2, ln_x": lambda: both_ways(block.ln1(x), block.ln2(x), att.ln_x(x.view(heads))),
        "channel mix": lambda: both_ways(ffn.value(squared_relu(ffn.key(x)))),
    }


def lerps(block: Any, x: Tensor) -> list[Tensor]:
    """Token shift and the seven mixes of a layer."""
    att, start = block.att, torch.zeros(x.shape[0], x.shape[-1])
    mixes = (att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g)
    difference = Timeline().shift(x, start)[0] - x
    out = [torch.addcmul(x, difference, mix) for mix in mixes]
    return [*out, torch.addcmul(x, Timeline().shift(x, start)[0] - x, block.ffn.x_k)]


def low_rank_maps(att: Any, x: Tensor) -> list[Tensor]:
    """Decay, in-context learning rate, value residual and gate."""
    log_w = -0.6065 * torch.sigmoid(att.w0 + torch.tanh(x @ att.w1) @ att.w2)
    rate = torch.sigmoid(att.a0 + (x @ att.a1) @ att.a2)
    return [log_w, rate, torch.sigmoid(att.v0 + (x @ att.v1) @ att.v2), torch.sigmoid(x @ att.g1) @ att.g2]


def elementwise(att: Any, x: Tensor, heads: tuple[int, ...]) -> list[Tensor]:
    """What is done to keys, values and outputs between the matrix products; x stands for all of them."""
    kk = F.normalize((x * att.k_k).view(heads), dim=-1)
    key = x * torch.addcmul(1 - att.k_a, x, att.k_a)
    value = x + (x.detach() - x) * x
    bonus = (x.view(heads) * key.view(heads) * att.r_k).sum(-1, keepdim=True) * value.view(heads)
    return [kk * x.view(heads), (x + bonus.flatten(-2)) * x]


def recurrence_inputs(shape: tuple[int, ...]) -> list[Tensor]:
    """r, log_w, k, v, a, b [B, T, H, N] as a model makes them."""
    r, q, k, v, kk, iclr = (torch.randn(shape) for _ in range(6))
    kk = F.normalize(kk, dim=-1)
    values = [r, -0.6065 * torch.sigmoid(q), k, v, -kk, kk * torch.sigmoid(iclr)]
    return [value.requires_grad_() for value in values]


def both_ways(*outputs: Tensor) -> None:
    """The backward pass that belongs to the forward pass which made `outputs`."""
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def show(name: str, table: dict[str, Any]) -> None:
    """One table."""
    print(f"\n{name}: {table['whole_step_ms']} ms, {table['tokens_per_second']:,} tokens/s")
    for part, value in sorted(table["milliseconds"].items(), key=lambda item: -item[1]):
        print(f"  {part:<30} {value:8.1f} ms {table['share'][part]:7.1%}")


if __name__ == "__main__":
    main()
