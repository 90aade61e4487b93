"""Settings for the whole suite: small tensors run fastest on one thread, and machines differ in speed."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from wkv import native

torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--native-library PATH` runs the tests with another build of the native kernels, such as one with sanitizers."""
    parser.addoption("--native-library", default=None, help="shared library to test in place of the installed one")


def pytest_configure(config: pytest.Config) -> None:
    """Load it before test modules ask whether the kernels are available.

    Without a GPU the Triton kernels run in Triton's interpreter, which is chosen before anything imports triton.
    Processes that tests start share the cores with other workers: with two threads each they would wait for each other.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if path := config.getoption("--native-library"):
        native.load(path)
