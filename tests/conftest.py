"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

# Threads that wait for each other shall sleep, not spin: on a busy machine spinning takes the others' time. To be set
# before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, trained weights and images beside the checkout; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder 'shared' (goldens, trained weights, images) beside the checkout; it is absent")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what takes many minutes, visibly, unless it is asked for."""
    if os.environ.get("SW_EXHAUSTIVE") == "1":
        return
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes: set SW_EXHAUSTIVE=1"))
