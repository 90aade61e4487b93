"""What the tests of the GPU kernels share. Without a GPU they run in Triton's interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch

from wkv.ops import gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = gpu.unusable(DEVICE)
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
