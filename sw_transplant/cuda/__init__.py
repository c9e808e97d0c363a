"""CUDA kernels, written in Numba, and what launches them. Only `launch` is imported before the first CUDA tensor.

Read in this order:

    sources             what a kernel is before it is compiled
    launch              runs kernels on PyTorch's streams; knows whether there is a GPU for them
    answers             what was found out about a device, and how long that holds
    driver              loads and launches, by the CUDA driver alone
    storage             compiled kernels on disk
    compiler            from Python to machine code, in several processes if there is much to do
    intrinsics          what kernel bodies need beyond Numba, on a GPU and in Numba's simulator
    shift_add           the paper's operator: shift and add, as gathers
    shift_add_kernels   the kernels of that
    toeplitz            large depthwise convolutions and the gradients of their kernels, on tensor cores
"""
