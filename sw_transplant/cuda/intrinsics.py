# mypy: disallow-untyped-defs=False
"""What kernel bodies need beyond Numba: pointer arithmetic, and 16-bit floats as they lie in memory.

A body is written once, for flat memory that it indexes: raw pointers on the GPU, arrays in Numba's CUDA simulator
(NUMBA_ENABLE_CUDASIM=1), which has neither pointers nor intrinsics. Each function here exists in both worlds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba.cuda import types
from numba.cuda.core import config

SIMULATOR = bool(config.ENABLE_CUDASIM)

if SIMULATOR:

    def device_function(function: Callable) -> Callable:
        """A function that kernels call."""
        return function

    def advance(memory, count):
        """Memory from element `count` on."""
        return memory[count:]

    def quotient(a, b):
        """a // b of two uint32; b is not zero."""
        return np.uint32(a) // np.uint32(b)

    def float32_bits(value):
        """float32 -> its bits as uint32."""
        return np.float32(value).view(np.uint32)

    def float32_from_bits(bits):
        """The float32 with these bits (uint32)."""
        return np.uint32(bits).view(np.float32)

else:
    from llvmlite import ir
    from numba.cuda.compiler import compile_cuda
    from numba.cuda.dispatcher import CUDADispatcher
    from numba.cuda.extending import intrinsic

    ANY_CAPABILITY = (8, 0)
    """Before NVVM nothing depends on it: every architecture gets the same functions."""
    _i64 = ir.IntType(64)

    class DeviceFunction(CUDADispatcher):
        """Typed and compiled once for each signature, and put into kernels by LLVM.

        Numba's own inlining copies a function at each of its calls before types are known, which took two thirds of a
        kernel's compilation. Numba's own device functions ask which device there is, even on the way to PTX.
        """

        def compile_device(self, args, return_type=None):
            if args not in self.overloads:
                made = compile_cuda(
                    self.py_func, return_type, args, forceinline=True, nvvm_options={"opt": 3}, cc=ANY_CAPABILITY
                )
                made.target_context.insert_user_function(made.entry_point, made.fndesc, [made.library])
                self.overloads[args] = made
            return self.overloads[args]

    def device_function(function: Callable) -> Callable:
        """A function that kernels call."""
        return DeviceFunction(function, {"device": True})

    @intrinsic
    def advance(typing_context, memory, count):
        """Memory from element `count` on."""

        def codegen(context, builder, signature, args):
            # Passed through an empty move, the compiler cannot add `count` to the index of every later access instead:
            # one 64-bit addition here for two in each of them.
            size = ir.Constant(_i64, memory.dtype.bitwidth // 8)
            move = ir.InlineAsm(ir.FunctionType(_i64, [_i64]), "mov.u64 $0, $1;", "=l,l")
            distance = builder.call(move, [builder.mul(args[1], size)])
            bytes_after = builder.gep(builder.bitcast(args[0], ir.IntType(8).as_pointer()), [distance])
            return builder.bitcast(bytes_after, args[0].type)

        return memory(memory, types.int64), codegen

    @intrinsic
    def quotient(typing_context, a, b):
        """a // b of two uint32; b is not zero."""

        def codegen(context, builder, signature, args):
            return builder.udiv(*args)  # Numba's // would test for zero, with a branch

        return types.uint32(types.uint32, types.uint32), codegen

    @intrinsic
    def float32_bits(typing_context, value):
        """float32 -> its bits as uint32."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.IntType(32))

        return types.uint32(types.float32), codegen

    @intrinsic
    def float32_from_bits(typing_context, bits):
        """The float32 with these bits (uint32)."""

        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], ir.FloatType())

        return types.float32(types.uint32), codegen


@device_function
def same(value):
    """float32 and float64 are added as they are stored."""
    return value


@device_function
def widen_float16(value):
    """float16 -> float32, exact."""
    return types.float32(value)


@device_function
def round_to_float16(value):
    """float32 -> nearest float16, ties to even."""
    return types.float16(value)


@device_function
def widen_bfloat16(bits):
    """Bits of a bfloat16 (uint16) -> float32, exact."""
    return float32_from_bits(types.uint32(types.uint32(bits) << types.uint32(16)))


@device_function
def round_to_bfloat16(value):
    """float32 -> bits of the nearest bfloat16 (uint16), ties to even. A NaN becomes PyTorch's, 0x7fc0."""
    bits = float32_bits(value)
    if value != value:
        return types.uint16(0x7FC0)  # rounding up its mantissa could carry into the exponent
    odd = types.uint32(bits >> types.uint32(16)) & types.uint32(1)
    # 2**16 at the most is added to at most 0xff800000 (infinity): no overflow.
    return types.uint16(types.uint32(bits + types.uint32(0x7FFF) + odd) >> types.uint32(16))


@dataclass(frozen=True)
class Scalar:
    """How one dtype is stored, and how kernels compute with it."""

    stored: Any  # the Numba type in memory
    computed: Any  # the Numba type of sums
    widen: Callable  # stored -> computed
    narrow: Callable  # computed -> stored


SCALARS = {
    torch.float32: Scalar(types.float32, types.float32, same, same),
    torch.float64: Scalar(types.float64, types.float64, same, same),
    torch.float16: Scalar(types.float16, types.float32, widen_float16, round_to_float16),
    torch.bfloat16: Scalar(types.uint16, types.float32, widen_bfloat16, round_to_bfloat16),
}
