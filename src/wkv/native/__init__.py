"""The CPU kernels: finding and calling the C++ library that was built when wkv was installed.

Nothing is built here. Without the library (installed where there was no compiler) everything works through the torch
forms; `wkv doctor` says so, and `unavailable()` why.
"""

from wkv.native.library import (
    ABI_VERSION,
    INSTRUCTION_SETS,
    available,
    function,
    instruction_set,
    load,
    num_threads,
    threads,
    unavailable,
    unusable,
    use_instruction_set,
)

__all__ = [
    "ABI_VERSION",
    "INSTRUCTION_SETS",
    "available",
    "function",
    "instruction_set",
    "load",
    "num_threads",
    "threads",
    "unavailable",
    "unusable",
    "use_instruction_set",
]
