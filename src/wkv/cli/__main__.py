"""`python -m wkv.cli` is the same as `wkv`."""

from wkv.cli import main

main()
