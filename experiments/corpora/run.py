"""Train the demo's model on each of the Debian documentation corpora, and compare it with xz on held-out text.

python examples/prepare_corpora.py --out corpora
python experiments/corpora/run.py corpora            # five minutes of training for each corpus
python experiments/corpora/run.py corpora --quick    # 20 seconds for each, to see that it works

Runs stay in --runs, and a second call goes on from there; result.json and plot.png are written beside this script.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import wkv
from wkv.files import replacing
from wkv.speed.evidence import evidence
from wkv.training import load_recipe, read_result, resume_recipe, train
from wkv.training.log import read_log
from wkv.training.source import load_corpus

HERE = Path(__file__).resolve().parent
SECONDS = {True: 20, False: 300}


def measure(corpus: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Train on a corpus, or take the run that is there; what came out."""
    overrides = [f"data.source='{corpus}'", f"train.seconds={seconds}"]
    result = read_result(folder)
    if result is None:
        resume = (folder / "recipe.yaml").is_file()
        result = train(resume_recipe(folder) if resume else load_recipe("demo", overrides), folder, resume)
    model = wkv.load_model(result.model)
    found = load_corpus(resume_recipe(folder).data, lambda documents: model.tokenizer)
    text = b"".join(part.encode() if isinstance(part, str) else part for part in found.held_out)
    rows = [row for row in read_log(folder / "log.csv") if "bits_per_byte" in row]
    manifest = json.loads((corpus / "manifest.json").read_text())
    return {
        **{key: manifest[key] for key in ("package", "version", "sha256", "license", "files", "bytes")},
        "train_bytes": found.num_bytes, "train_tokens": found.store.num_tokens, "held_out_bytes": len(text),
        "parameters": result.parameters, "steps": result.steps, "tokens": result.tokens,
        "seconds": round(result.seconds), "precision": result.precision, "bits_per_byte": result.bits_per_byte,
        "xz_9e_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "curve_seconds_bits_per_byte": [[round(row["seconds"]), row["bits_per_byte"]] for row in rows],
    }  # fmt: skip


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out bits per byte over training time, one line per corpus."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(results):
        seconds, scores = zip(*result["curve_seconds_bits_per_byte"], strict=True)
        axes.plot(seconds, scores, f"C{number}o-", label=result["package"], markersize=3)
        axes.axhline(
            result["xz_9e_bits_per_byte"], color=f"C{number}", linestyle=":", label="xz -9e on its held-out text"
        )
    axes.set(xlabel="seconds of training", ylabel="bits per byte of held-out text (first 20 kB)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder made by examples/prepare_corpora.py")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/corpora"), help="keeps the runs (default: %(default)s)")
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.corpora.glob("*/manifest.json"))
    if not folders:
        sys.exit(
            f"{options.corpora} holds no corpus; make some with examples/prepare_corpora.py --out {options.corpora}"
        )
    out = options.runs / "quick" if options.quick else HERE
    out.mkdir(parents=True, exist_ok=True)
    runs = options.runs / ("quick" if options.quick else "full")
    results = [measure(folder, runs / folder.name, SECONDS[options.quick]) for folder in folders]
    arguments = ["corpora", *(["--quick"] if options.quick else [])]
    facts = evidence(__file__, arguments, ("torch", "tokenizers"))
    with replacing([out / "result.json"]) as [temporary]:
        temporary.write_text(json.dumps({**facts, "seed": 42, "results": results}, indent=1) + "\n")
    plot(results, out / "plot.png")
    for result in results:
        print(
            f"{result['package']}: {result['bits_per_byte']:.3f} bits per byte, xz {result['xz_9e_bits_per_byte']:.3f}"
        )


if __name__ == "__main__":
    main()
