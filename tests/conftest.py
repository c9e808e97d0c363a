"""Fixtures that every test may use."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.sampling import EXHAUSTIVE

# Threads that wait for each other shall sleep, not spin: on a busy machine spinning takes the others' time. To be set
# before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; those that they start inherit it
    os.environ["OMP_NUM_THREADS"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, trained weights and images beside the checkout; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder 'shared' (goldens, trained weights, images) beside the checkout; it is absent")
    return SHARED


def pytest_report_header() -> str:
    return f"exhaustive tests: {'run too' if EXHAUSTIVE else 'left out, SW_EXHAUSTIVE=1 runs them too'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the many that take long, unless they are asked for, and puts first what ends last."""
    left_out = [] if EXHAUSTIVE else [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
    early = {_scope(item) for item in items if item.get_closest_marker("early")}
    counts = Counter(map(_scope, items))
    items.sort(key=lambda item: (_scope(item) not in early, -counts[_scope(item)]))


def _scope(item: pytest.Item) -> str:
    """What processes share out: the tests of a class, or of a file."""
    return item.nodeid.rpartition("::")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU: here, because the summary then has one line for all of them."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("marked gpu: needs a CUDA device")
