"""Which memory formats the Toeplitz kernels take for a geometry.

They read and write contiguous and channels_last maps alike. A few channels of a channels_last map are staged at once,
though, and where these do not fit into shared memory, as with tiles that have a wide halo, a contiguous copy is made
first: outside of the operators, where a compiler sees it and may make it a part of what comes before. So it is where
the kernels for channels_last maps have failed their trial on a device, and those for contiguous ones have not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sw_transplant.cuda import launch
from sw_transplant.ops.toeplitz_reference import dense_format, pairs
from sw_transplant.ops.toeplitz_selftest import is_left_out
from sw_transplant.ops.tracing import constant_when_traced


def takes(x: Tensor, sizes: Sequence[int], origins: Sequence[int], gradient: bool = False) -> bool:
    """Whether the operators take a map as it is.

    Args:
        x: (B, C, H, W), of any strides.
        sizes, origins: (kh, kw) and (top, left) of each kernel one after the other.
        gradient: of `toeplitz_weight_grad`, instead of `toeplitz_conv`.

    Returns:
        False where x is to be made contiguous first. PyTorch's convolutions, which run where there is no kernel, take
        whatever comes.
    """
    if x.is_contiguous():
        return True
    if x.device.type != "cuda":
        return True
    if dense_format(x) != torch.channels_last:
        return False
    channels, size = int(x.shape[1]), (int(x.shape[2]), int(x.shape[3]))
    return takes_channels_last(x.dtype, x.device.index, channels, size, tuple(sizes), tuple(origins), gradient)


@constant_when_traced
def takes_channels_last(
    dtype: torch.dtype,
    device: int,
    channels: int,
    size: tuple[int, int],
    sizes: tuple[int, ...],
    origins: tuple[int, ...],
    gradient: bool = False,
) -> bool:
    """The same for channels_last maps on CUDA device number `device`."""
    if not launch.is_available(device):
        return True
    from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan
    from sw_transplant.cuda.toeplitz.launcher import arguments_for
    from sw_transplant.cuda.toeplitz.settings import choose_plan

    choose = choose_gradient_plan if gradient else choose_plan
    geometry, place = (dtype, device, 1, channels, size, pairs(sizes), pairs(origins)), torch.device("cuda", device)
    native = arguments_for(*geometry, True)
    if native is not None and choose(*native) is not None and not is_left_out(place, True, gradient):
        return True
    copied = arguments_for(*geometry, False)
    return copied is None or choose(*copied) is None or is_left_out(place, False, gradient)
