"""The geometries that every implementation of shift_add is checked on, and the definition as plain loops."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@dataclass(frozen=True)
class Case:
    """One geometry; placements are drawn at random around z, with repeated, absent and pointless rows among them."""

    name: str
    batch: int
    channels: int
    tiles: int
    z_size: tuple[int, int]
    branches: int
    rows: int
    out_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    per_channel: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """z, placements and an upstream gradient."""
        generator = torch.Generator().manual_seed(len(self.name))
        z = torch.randn(self.batch, self.channels, self.tiles, *self.z_size, generator=generator, dtype=torch.float64)
        grad = torch.randn(
            self.branches, self.batch, self.channels, *self.out_size, generator=generator, dtype=torch.float64
        )
        shape = (self.branches, self.channels if self.per_channel else 1, self.rows)
        reach = [max(z, s * o) for z, s, o in zip(self.z_size, self.stride, self.out_size, strict=True)]
        columns = [torch.randint(-1, self.tiles + 1, shape, generator=generator)]  # -1 and T: absent
        columns += [torch.randint(-r - 1, r + 2, shape, generator=generator) for r in reach]
        placements = torch.stack(columns, dim=-1).to(torch.int32)
        placements[0, 0, 0] = torch.tensor([0, 0, 0])  # every case has a row that counts
        placements[-1, 0, -1] = torch.tensor([0, 0, -1])  # the same tile again, and a negative shift
        return z.to(dtype), placements, grad.to(dtype)


CASES = [
    Case("plain", 2, 3, 4, (9, 8), 2, 6, (5, 7)),
    Case("odd sizes, one image", 1, 5, 3, (13, 11), 3, 4, (9, 7)),
    Case("per channel", 2, 3, 4, (7, 9), 2, 9, (6, 5), per_channel=True),
    Case("map smaller than the kernel", 3, 2, 5, (7, 7), 2, 8, (3, 3)),
    Case("map of one pixel", 2, 2, 2, (3, 3), 1, 3, (1, 1)),
    Case("stride 2", 2, 3, 3, (11, 12), 2, 5, (5, 6), stride=(2, 2)),
    Case("stride 3 and 1, per channel", 1, 2, 3, (13, 7), 2, 5, (4, 6), stride=(3, 1), per_channel=True),
    Case("stride 1 and 2", 2, 2, 3, (6, 13), 1, 7, (5, 6), stride=(1, 2)),
    Case("one row", 2, 1, 1, (4, 5), 1, 1, (4, 5)),
]


def naive_shift_add(z: Tensor, placements: Tensor, out_size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The definition, one element at a time: sums in the order of p, in float32 (float64 for float64), rounded once."""
    source = _as_summed(z)
    table = placements.expand(-1, z.shape[1], -1, -1).numpy()
    out = np.zeros((placements.shape[0], *z.shape[:2], *out_size), source.dtype)
    for k, b, c, h, w in np.ndindex(out.shape):
        for tile, y, x in table[k, c]:
            i, j = stride[0] * h + y, stride[1] * w + x
            if 0 <= tile < z.shape[2] and 0 <= i < z.shape[3] and 0 <= j < z.shape[4]:
                out[k, b, c, h, w] += source[b, c, tile, i, j]
    return torch.from_numpy(out).to(z.dtype)


def naive_shift_add_backward(
    grad: Tensor, placements: Tensor, tiles: int, z_size: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Its transpose, one term at a time, in the order of k and p."""
    source = _as_summed(grad)
    table = placements.expand(-1, grad.shape[2], -1, -1).numpy()
    out = np.zeros((*grad.shape[1:3], tiles, *z_size), source.dtype)
    for k in range(grad.shape[0]):
        for p in range(placements.shape[2]):
            for b, c, h, w in np.ndindex(grad.shape[1:]):
                tile, y, x = table[k, c, p]
                i, j = stride[0] * h + y, stride[1] * w + x
                if 0 <= tile < tiles and 0 <= i < z_size[0] and 0 <= j < z_size[1]:
                    out[b, c, tile, i, j] += source[k, b, c, h, w]
    return torch.from_numpy(out).to(grad.dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype and every bit: torch.equal would let 0.0 pass for -0.0."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = actual.cpu().contiguous().view(bits) != expected.cpu().contiguous().view(bits)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} elements differ"


def _as_summed(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy()
