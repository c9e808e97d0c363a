"""What `tests.cuda.traffic` counts: operators of a traced graph, and copies of maps among them."""

import pytest
import torch
from torch import Tensor, nn

from sw_transplant import convert, set_form
from tests.cuda.traffic import count, traced

BATCH, CHANNELS, SIDE = 3, 8, 15
MAP = 4 * BATCH * CHANNELS * SIDE * SIDE


class Copying(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous().contiguous(memory_format=torch.channels_last)


def network(*between: nn.Module) -> tuple[nn.Module, Tensor]:
    sizes = (13, 9)
    convs = [nn.Conv2d(CHANNELS, CHANNELS, k, padding=k // 2, groups=CHANNELS, bias=False) for k in sizes]
    model = convert(
        nn.Sequential(convs[0], *between, nn.GELU(), convs[1], nn.GELU()).to(memory_format=torch.channels_last)
    )
    set_form(model, "toeplitz")
    x = torch.empty(BATCH, CHANNELS, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    return model, x


@pytest.mark.parametrize("training", [False, True])
def test_operators_on_channels_last_maps_copy_nothing(training: bool) -> None:
    found = count(traced(*network(), training), BATCH)
    assert (found["copies"], found["copied"]) == (0, 0)
    # Two layers: a map and a result each; in training these, two maps for the kernels, and a gradient and its result
    # (the images want no gradient).
    maps = 4 + (4 + 2 if training else 0)
    assert found["copies more"] == maps
    assert found["copied more"] == 2 * maps * MAP
    kernels = 4 * CHANNELS * (13 * 13 + 9 * 9)  # read, and in training their gradients written; one is read once more
    again = kernels + 4 * CHANNELS * 9 * 9 if training else 0
    assert found["toeplitz"] == maps * MAP + kernels + again
    assert found["all"] > found["toeplitz"]


def test_copies_are_found() -> None:
    found = count(traced(*network(Copying()), False), BATCH)
    assert (found["copies"], found["copied"]) == (2, 4 * MAP)
    model, x = network()
    set_form(model, "gemm")
    assert count(traced(model, x, False), BATCH)["copies"] >= 2
