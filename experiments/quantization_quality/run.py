"""What 8 and 4 bits cost on a model that this library trained: bits per byte on held-out text, group by group.

python experiments/quantization_quality/run.py            # three seeds: trains about 5 minutes each, measures about 3
python experiments/quantization_quality/run.py --quick    # a tiny model, one seed, under 2 minutes in all

Models and their measurements stay in --runs; a second run goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from variants import FOUR_BIT, RoundTrip, ggml, symmetric

import wkv
from wkv import native
from wkv.data import load_documents, split_held_out
from wkv.files import replacing
from wkv.inference.native_rwkv7 import NativeRWKV7, unsupported
from wkv.layers.language_model import LanguageModel
from wkv.quantization import compare_models, default_policy, quantize_model, resident_bytes
from wkv.quantization.model import set_parameter, skeleton
from wkv.quantization.policy import group_of
from wkv.quantization.report import alone_models
from wkv.training import load_recipe, read_result, train

HERE = Path(__file__).resolve().parent
SEEDS = {True: (42,), False: (42, 43, 44)}
RECIPES = {True: ("tiny", 150, 3_000), False: ("demo", 720, 24_000)}  # name, steps of training, held-out tokens
SMALL = ("att", "ffn_key", "ffn_value")
LARGE = (*SMALL, "emb", "head")
BARS = {"int8": 0.001, "int4": 0.02}


def trained(quick: bool, folder: Path, seed: int) -> tuple[LanguageModel, dict[str, Any]]:
    """The model in `folder`, trained now if it is not there yet, and what is known about its training."""
    name, steps, _ = RECIPES[quick]
    overrides = [f"train.steps={steps}", "train.threads=1", f"train.seed={seed}"]
    result = read_result(folder)
    if result is None:
        plan = load_recipe(name, overrides)
        result = train(plan, folder, resume=(folder / "recipe.yaml").is_file())
    facts = {"recipe": name, "overrides": overrides, "steps": result.steps, "tokens": result.tokens}
    facts |= {"parameters": result.parameters, "precision": result.precision, "seconds": round(result.seconds)}
    return wkv.load_model(result.model), facts


def round_trip_model(model: LanguageModel, groups: tuple[str, ...], function: RoundTrip) -> LanguageModel:
    """The model with the matrices of `groups` replaced by what their codes stand for."""
    result = skeleton(model)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        set_parameter(result, name, function(value).to(value.dtype) if group_of(name) in groups else value)
    return result.eval()


def contenders(model: LanguageModel) -> dict[str, LanguageModel]:
    """Everything that is compared with the float32 model."""
    models = {f"int{bits}": quantize_model(model, bits) for bits in (8, 4)}
    for bits in (8, 4):
        alone = alone_models(model, default_policy(bits))
        models |= {f"alone {name}": each for name, each in alone.items()}
    models["large matrices in Q8_0"] = round_trip_model(model, LARGE, ggml("Q8_0"))
    # The symmetric form without the rounding of activations, like its rivals.
    trips = {name: function for name, (_, function) in FOUR_BIT.items()}
    models |= {f"4 bits: {name}": round_trip_model(model, SMALL, function) for name, function in trips.items()}
    models["head alone in 4 bits (symmetric)"] = round_trip_model(model, ("head",), symmetric)
    models["embedding alone in 4 bits (symmetric)"] = round_trip_model(model, ("emb",), symmetric)
    return models


def weight_errors(model: LanguageModel) -> dict[str, dict[str, float]]:
    """Relative error of each four-bit form on normal weights and on the trained matrices."""
    torch.manual_seed(0)
    normal = torch.randn(512, 768)
    matrices = [p.detach().float() for name, p in model.named_parameters() if group_of(name) in SMALL]
    errors = {}
    for name, (bits, function) in FOUR_BIT.items():
        lost = sum(float((function(matrix) - matrix).square().sum()) for matrix in matrices)
        total = sum(float(matrix.square().sum()) for matrix in matrices)
        gauss = float((function(normal) - normal).norm() / normal.norm())
        errors[name] = {"bits": bits, "normal": gauss, "trained": (lost / total) ** 0.5}
    return errors


@torch.inference_mode()
def zero_shares(model: LanguageModel, tokens: Tensor) -> list[float]:
    """Share of exact zeros in the squared ReLU of every layer."""
    shares: list[float] = []
    hooks = [
        block.ffn.value.register_forward_pre_hook(
            lambda _, inputs: shares.append(float((inputs[0] == 0).float().mean()))
        )
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return shares


def skipped(model: LanguageModel, tokens: Tensor) -> float | None:
    """Share of the value matrix that the native kernels do not read in single-token decoding."""
    if unsupported(model) is not None:
        return None
    run, state = NativeRWKV7(model), None
    for token in tokens[0, :512]:
        _, state = run.read(token.view(1, 1), state)
    return run.skipped_share


def hardware() -> dict[str, Any]:
    """Where this runs."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    kernels = native.instruction_set() if native.available() else "none"
    return {"cpu": cpu, "threads": torch.get_num_threads(), "native": kernels}


def measure(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """Train, quantise, compare; what was measured before is read."""
    kept = folder / "quantization.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    model, training = trained(quick, folder, seed)
    _, held_out = split_held_out(load_documents("sotu"))
    models = contenders(model)
    started = time.perf_counter()
    found = compare_models(
        model, models, [document.text for document in held_out], max_tokens=RECIPES[quick][2],
        progress=lambda done, total, what: print(f"seed {seed}: {done}/{total} tokens, {what}", flush=True),
    ).to_dict()  # fmt: skip
    ids = torch.tensor([model.tokenizer.encode(held_out[0].text)[:2048]])
    bits = {"float32": model, **{name: models[name] for name in ("int8", "int4")}}
    result = {
        "seed": seed,
        "training": training,
        "evaluation": {"tokens": found["tokens"], "bytes": found["num_bytes"], "documents": "read whole, in order"},
        "bits_per_byte": found["bits_per_byte"],
        "models": found["others"],
        "weight_errors": weight_errors(model),
        "resident_bytes": {name: resident_bytes(each) for name, each in bits.items()},
        "zeros_per_layer": {name: zero_shares(each, ids) for name, each in bits.items()},
        "skipped_in_decoding": {name: skipped(each, ids) for name, each in bits.items()},
        "seconds": round(time.perf_counter() - started),
    }
    with replacing([kept]) as [temporary]:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every model: mean, lowest and highest change of bits per byte, and mean divergence."""
    summary = {}
    for name in runs[0]["models"]:
        changes = [run["models"][name]["change"] for run in runs]
        divergences = [run["models"][name]["kl"] for run in runs]
        summary[name] = {
            "change": sum(changes) / len(changes), "lowest": min(changes), "highest": max(changes),
            "kl": sum(divergences) / len(divergences), "kl_range": [min(divergences), max(divergences)],
        }  # fmt: skip
    return summary


def evidence(arguments: list[str]) -> dict[str, Any]:
    """Where the numbers come from."""
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"wkv": wkv.__version__, "torch": torch.__version__, "python": platform.python_version()}
    versions["numpy"] = importlib.metadata.version("numpy")
    command = " ".join(["python experiments/quantization_quality/run.py", *arguments])
    return {"command": command, "commit": commit, "versions": versions, "hardware": hardware()}


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: each group alone and all together; right: the four-bit forms."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = result["summary"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), constrained_layout=True)
    alone = {name.removeprefix("alone "): each for name, each in models.items() if name.startswith("alone ")}
    together = {f"all, {name[3:]} bits": models[name] for name in ("int8", "int4")}
    rows = alone | together
    spread = [(100 * each["lowest"], 100 * each["highest"]) for each in rows.values()]
    _bars(left, list(rows), [100 * each["change"] for each in rows.values()], spread, "+.4f")
    left.set_xlabel("change of bits per byte, % (bars of the claim: 0.1 for 8 bits, 2 for 4)")
    left.set_title("one group alone, and all together")
    forms = {name.removeprefix("4 bits: "): each for name, each in models.items() if name.startswith("4 bits: ")}
    sizes = {name: f"{name}, {bits:g} bits" for name, (bits, _) in FOUR_BIT.items()}
    spread = [tuple(1000 * kl for kl in each["kl_range"]) for each in forms.values()]
    _bars(right, [sizes[name] for name in forms], [1000 * each["kl"] for each in forms.values()], spread, ".3f")
    right.set_xlabel("KL divergence from float32, 0.001 nats per token")
    right.set_title("forms of 4 bits: att and ffn, the rest float32")
    figure.savefig(path, dpi=130)


def _bars(axes: Any, names: list[str], values: list[float], spread: list[Any], style: str) -> None:
    """Means as bars, lowest and highest of the seeds as whiskers."""
    fine = [name.endswith(("int8", "float16", "8 bits")) for name in names]
    axes.barh(names[::-1], values[::-1], color=["tab:blue" if each else "tab:orange" for each in fine[::-1]])
    lengths = [[value - low for value, (low, _) in zip(values, spread, strict=True)][::-1]]
    lengths.append([high - value for value, (_, high) in zip(values, spread, strict=True)][::-1])
    axes.errorbar(values[::-1], range(len(values)), xerr=lengths, fmt="none", ecolor="0.3", capsize=2, linewidth=0.8)
    for place, (value, (_, high)) in enumerate(zip(values[::-1], spread[::-1], strict=True)):
        text = format(value, style)
        axes.annotate(text, (max(high, 0), place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.3)
    axes.grid(axis="x", alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model; results go to --runs, not here")
    parser.add_argument("--runs", type=Path, default=None, help="folder of the training runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--native", type=Path, default=None, help="another build of the native library")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.native is not None:
        native.load(options.native)
    folder = options.runs or Path("runs") / f"quantization_quality{'_quick' * options.quick}"
    runs = [measure(options.quick, folder / f"seed{seed}", seed) for seed in SEEDS[options.quick]]
    summary = over_seeds(runs)
    result = {**evidence(["--quick"] * options.quick), "bars": BARS, "summary": summary, "runs": runs}
    out = folder if options.quick else HERE
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out / "plot.png")
    for name in ("int8", "int4"):
        each = summary[name]
        spread = f"{each['lowest']:+.4%} to {each['highest']:+.4%}"
        print(f"{name}: {each['change']:+.4%} bits per byte ({spread}), bar {BARS[name]:.1%}")
    sys.exit(any(summary[name]["highest"] >= bar for name, bar in BARS.items()))


if __name__ == "__main__":
    main()
