"""Numba's CUDA kernels, and what launches them. Only `launch` is imported before the first call with a CUDA tensor.

Read in this order:

    launch        compiles kernels and runs them on PyTorch's streams; knows whether there is a GPU for them
    intrinsics    what kernel bodies need beyond Numba, on a GPU and in Numba's simulator
    shift_add     the paper's operator: shift and add, as gathers
    toeplitz      large depthwise convolutions and the gradients of their kernels, on tensor cores
"""
