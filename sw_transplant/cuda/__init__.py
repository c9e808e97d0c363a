"""Numba CUDA kernels and their launcher. Nothing here is imported before the first call with a CUDA tensor."""
