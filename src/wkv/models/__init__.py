"""One file per system, to be read from top to bottom as the paper."""
