# mypy: disallow-untyped-defs=False
"""What the Toeplitz kernel needs beyond `intrinsics`, on the GPU and in Numba's CUDA simulator."""

import numpy as np

from sw_transplant.cuda.intrinsics import SIMULATOR

if SIMULATOR:

    def round_to_tf32(value):
        """float32 -> bits of the nearest TF32 number (10 bits of mantissa), ties away from zero."""
        bits = np.float32(value).view(np.uint32)
        return np.uint32((int(bits) + 0x1000) & 0xFFFFE000) if np.isfinite(value) else bits

    def thread_afresh(index):
        """The thread's index in its block."""
        return index

    def block_afresh(index):
        """The block's index."""
        return index

else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    from sw_transplant.cuda.toeplitz import emit

    @intrinsic
    def round_to_tf32(typing_context, value):
        """float32 -> bits of the nearest TF32 number (10 bits of mantissa), ties away from zero."""

        def codegen(context, builder, signature, args):
            return emit.round_to_tf32(builder, args[0])

        return types.uint32(types.float32), codegen

    # What is computed from these is computed where they stand: not before a loop, to wait in registers for its turn.

    def _read(register):
        def codegen(context, builder, signature, args):
            word = ir.IntType(32)
            read = ir.InlineAsm(ir.FunctionType(word, []), f"mov.u32 $0, {register};", "=r", side_effect=True)
            return builder.call(read, [])

        return codegen

    @intrinsic
    def thread_afresh(typing_context, index):
        """The thread's index in its block, read once more; `index` says the same in the simulator."""
        return types.int32(index), _read("%tid.x")

    @intrinsic
    def block_afresh(typing_context, index):
        """The block's index, read once more."""
        return types.int32(index), _read("%ctaid.x")
