"""What the Toeplitz kernels and those of their weight gradient are run on where there is a GPU, and how exact."""

import torch

BOUNDS = {"tf32": 2e-3, "ieee": 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS, DESIGN section 6
NUMBERS = [("tf32", torch.float32), ("ieee", torch.float32), ("tf32", torch.float16), ("tf32", torch.bfloat16)]
SHAPES = {
    "strips and a square": ((3, 4, 28, 28), [(49, 5), (5, 49), (5, 5)]),
    "odd, one image": ((1, 3, 55, 57), [(51, 5), (5, 51)]),
    "small map": ((130, 6, 7, 7), [(13, 5), (5, 13)]),
    "31 x 31": ((2, 3, 56, 56), [(31, 31)]),
    "13 x 13": ((9, 3, 14, 14), [(13, 13)]),
    "7 x 7": ((5, 7, 56, 56), [(7, 7)]),
    "halo": ((1, 3, 200, 336), [(51, 5), (5, 51)]),
    "halo, square": ((2, 2, 100, 168), [(31, 31)]),
    "halo, odd": ((2, 2, 101, 131), [(13, 13), (1, 1)]),
    "even kernels": ((3, 4, 15, 11), [(8, 4), (4, 6), (2, 2)]),
}


def bound(mode: str, dtype: torch.dtype) -> float:
    """The relative RMS error allowed for a precision of float32 convolutions and a dtype."""
    return BOUNDS[mode if dtype == torch.float32 else dtype]
