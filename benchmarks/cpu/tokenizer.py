"""Speed of the World tokenizers on one core: native, its uint16 form, our Python one, and that of the `rwkv` package.

    python benchmarks/cpu/tokenizer.py

Every contender encodes the same texts in turn, in rounds and in changing order; the ids are compared first. Reported:
the median over rounds of megabytes (10^6 bytes) per second, and of the ratio to our Python encoder in the same round.
The `rwkv` package is left out where it is not installed. Bar: the native encoder makes lists at 20 MB/s or more.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wkv import native
from wkv.data.documents import load_documents
from wkv.speed.evidence import evidence
from wkv.tokenizers import WorldTokenizer

ROOT = Path(__file__).resolve().parents[2]
BAR = 20.0  # MB/s
Encoder = Callable[[str], Any]


def main() -> None:
    """Run and write the result; exit status 1 below the bar."""
    options = parse()
    if options.library:
        native.load(options.library)
    encoders, samples = contenders(), texts(options.kilobytes * 1000)
    result = {
        "what": "World tokenizer: MB/s of text encoded on one core, by text and encoder",
        "texts": {name: measure(encoders, text, options.rounds) for name, text in samples.items()},
        "bar_mb_per_s": BAR,
        "rounds": options.rounds,
        "native_unavailable": native.unavailable(),
        **evidence(__file__, sys.argv[1:], ("rwkv",)),
    }
    rows = result["texts"].values()
    result["bar_reached"] = all(row["encoders"]["native"]["mb_per_s"] >= BAR for row in rows)
    write(options.out, result)
    for name, row in result["texts"].items():
        speeds = (f"{kind} {found['mb_per_s']:.1f} ({found['ratio']:.1f}x)" for kind, found in row["encoders"].items())
        print(f"{name}: MB/s {', '.join(speeds)}")
    sys.exit(not result["bar_reached"])


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilobytes", type=int, default=400, help="of each text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--library", type=Path, help="a native library in place of the installed one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tokenizer.json")
    return parser.parse_args()


def contenders() -> dict[str, Encoder]:
    """Name -> what encodes a str."""
    world = WorldTokenizer()
    found: dict[str, Encoder] = {
        "python": lambda text: world._encode(text.encode()),
        "native": world.encode,
        "native_array": world.encode_array,
    }
    spec = importlib.util.find_spec("rwkv")
    if spec is not None and spec.submodule_search_locations:
        from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

        vocabulary = Path(spec.submodule_search_locations[0]) / "rwkv_vocab_v20230424.txt"
        found["rwkv_package"] = TRIE_TOKENIZER(str(vocabulary)).encode
    return found


def texts(size: int) -> dict[str, str]:
    """English speeches, many languages and scripts, and this library's own source code; `size` bytes of each or so."""
    cases = json.loads((ROOT / "tests/golden/world_tokenizer/cases.json").read_text(encoding="utf-8"))
    golden = [base64.b64decode(case["bytes_b64"]).decode("utf-8", "ignore") for case in cases]
    many = "\n".join(text for text in golden if not text.isascii())
    english = "".join(document.text for document in load_documents("sotu")[::40])
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    return {
        "english": english[:size],
        "multilingual": many * (size // len(many.encode()) + 1),
        "code": code[:size],
    }


def measure(encoders: dict[str, Encoder], text: str, rounds: int) -> dict[str, Any]:
    """Check that all give the same ids, then time them in rounds."""
    ids = {name: list(map(int, encode(text))) for name, encode in encoders.items()}
    if any(found != ids["python"] for found in ids.values()):
        raise SystemExit("the encoders disagree")
    names, times = list(encoders), []
    for number in range(rounds):
        shift = number % len(names)
        times.append({name: seconds(encoders[name], text) for name in names[shift:] + names[:shift]})
    size = len(text.encode())
    found = {
        name: {
            "mb_per_s": statistics.median(size / row[name] / 1e6 for row in times),
            "mb_per_s_by_round": [round(size / row[name] / 1e6, 2) for row in times],
            "ratio": statistics.median(row["python"] / row[name] for row in times),
        }
        for name in names
    }
    return {"bytes": size, "ids": len(ids["python"]), "encoders": found}


def seconds(encode: Encoder, text: str) -> float:
    """Of one run."""
    started = time.perf_counter()
    encode(text)
    return time.perf_counter() - started


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
