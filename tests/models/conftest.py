"""Small versions of the registered networks."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import sw_transplant.models  # noqa: F401

SMALL = {
    "slak_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "kernel_size": (13, 11, 9, 7, 3)},
    "replknet_31b": {"layers": (1, 1, 2, 1), "channels": (8, 12, 16, 20), "large_kernel_sizes": (13, 11, 9, 7)},
    "unireplknet_t": {
        "depths": (1, 1, 2, 1),
        "dims": (8, 12, 16, 20),
        "kernel_sizes": ((3,), (13,), (7, 5), (9,)),
    },
}


@pytest.fixture(scope="session")
def full_size() -> Callable[[str], nn.Module]:
    """The registered network of a name, on the meta device; built once, to be read only."""

    @functools.cache
    def build(name: str) -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name).eval()

    return build


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """Build one of the registered networks through timm, with few channels and blocks."""

    def build(**kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        settings = {"num_classes": 5, **SMALL[request.param], **kwargs}
        return timm.create_model(request.param, **settings).eval()

    return build


@pytest.fixture
def images() -> torch.Tensor:
    """Two images, higher than wide, of a size that 32 does not divide."""
    return torch.randn(2, 3, 104, 72, generator=torch.Generator().manual_seed(0))
