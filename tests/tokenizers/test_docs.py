"""The example of docs/tokenizers.md runs and prints nothing unexpected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "tokenizers.md"


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    checks = "assert (ids, text) == ([33155, 45, 40213, 34], 'Hello, world!')\n"
    done = subprocess.run([sys.executable, "-c", example[1] + checks], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
    assert (tmp_path / "tokenizer.json").is_file()
