"""The shift_add kernels without a GPU: their bodies in Numba's CUDA simulator, and how work is divided over blocks."""

import pytest
import torch

pytest.importorskip("numba.cuda", reason="needs numba-cuda")

from sw_transplant.cuda.shift_add import INT32_MAX, backward_plan, divide, forward_plan, supports
from tests.cuda.simulate_shift_add import MORE_RUNS, RUNS
from tests.sampling import sample

SIMULATED = [((), len(RUNS)), (("--all",), len(RUNS) + len(MORE_RUNS))]


@pytest.mark.early
@pytest.mark.parametrize(("options", "runs"), sample(SIMULATED, SIMULATED[:1]))
def test_bodies_in_the_simulator(simulate, options, runs: int) -> None:
    lines = simulate("simulate_shift_add.py", *options).splitlines()
    found = [sum(line.startswith(start) for line in lines) for start in ("forward", "backward", "bfloat16")]
    assert found == [runs, runs, 1]


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("channels", [1, 124, 998])
@pytest.mark.parametrize("plane", [1, 49, 121, 196, 3136, 3600, 67200])
@pytest.mark.parametrize("per_thread", [4, 8])
def test_division_covers_every_position_once(batch: int, channels: int, plane: int, per_thread: int) -> None:
    d = divide(batch, channels, plane, per_thread, image_size=channels * plane * 23)
    assert 1 <= d.images <= batch
    assert (d.groups - 1) * d.images < batch <= d.groups * d.images
    assert d.parts == 1 or d.images == 1
    covered = d.step * per_thread
    assert (d.parts - 1) * covered < d.images * plane <= d.parts * covered
    assert d.step <= d.threads <= 256
    assert d.threads % 32 == 0


def test_division_keeps_offsets_of_a_block_in_32_bits() -> None:
    assert divide(64, 2**14, 49, 4, image_size=2**29).images == 3
    assert divide(64, 2**14, 49, 4, image_size=2**40).images == 1
    z_shape, out_shape = (64, 2**16, 23, 60, 60), (3, 64, 2**16, 56, 56)
    for plan in (forward_plan, backward_plan):
        sizes = plan(torch.float32, z_shape, (3, 1, 11, 3), out_shape, (1, 1)).sizes
        assert max(sizes) <= INT32_MAX


def test_division_makes_blocks_enough_where_it_can() -> None:
    assert divide(8, 124, 49, 8, image_size=124 * 49).images == 1
    assert divide(64, 998, 49, 8, image_size=998 * 49).images > 8
    z_shape, out_shape = (1, 96, 23, 11, 11), (3, 1, 96, 7, 7)
    assert backward_plan(torch.float32, z_shape, (3, 1, 11, 3), out_shape, (1, 1)).grid >= 1000


def test_limits() -> None:
    table = torch.empty(3, 1, 11, 3, dtype=torch.int32, device="meta")
    usual = {"placements": table, "tiles": 23, "z_size": (60, 60), "out_size": (56, 56), "stride": (1, 1)}
    assert supports(**usual)
    assert not supports(**(usual | {"z_size": (2**14, 2**13)}))
    assert not supports(**(usual | {"out_size": (2**16, 2**15)}))
    assert not supports(**(usual | {"stride": (2**26, 1)}))
    assert not supports(**(usual | {"placements": table.expand(3, 1, 11, 3).new_empty(3, 1, 700, 3)}))
    assert not supports(**(usual | {"tiles": 2049, "z_size": (1, 1)}))
    largest = backward_plan(torch.float32, (1, 1, 2048, 1, 1), (1, 1, 2048, 3), (1, 1, 1, 1, 1), (1, 1))
    assert largest.shared_bytes <= 48 * 1024
