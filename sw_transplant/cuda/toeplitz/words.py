# mypy: disallow-untyped-defs=False
"""What the Toeplitz kernel needs beyond `intrinsics`, on the GPU and in Numba's CUDA simulator."""

import numpy as np

from sw_transplant.cuda.intrinsics import SIMULATOR

if SIMULATOR:

    def round_to_tf32(value):
        """float32 -> bits of the nearest TF32 number (10 bits of mantissa), ties away from zero."""
        bits = np.float32(value).view(np.uint32)
        return np.uint32((int(bits) + 0x1000) & 0xFFFFE000) if np.isfinite(value) else bits

    def float16_bits(value):
        """float16 -> its bits as uint16."""
        return np.float16(value).view(np.uint16)

    def float16_from_bits(bits):
        """The float16 with these bits (uint16)."""
        return np.uint16(bits).view(np.float16)

    def load_words_of(count):
        """The function (memory, index) -> `count` words of 32 bits; their address is a multiple of their size."""

        def load_words(memory, index):
            values = np.asarray(getattr(memory, "_ary", memory))
            per_word = 4 // values.itemsize
            assert index % (count * per_word) == 0
            assert 0 <= index <= len(values) - count * per_word
            return tuple(values[index : index + count * per_word].view(np.uint32))

        return load_words

    def store_words_of(count):
        """The function (memory, index, words) that writes `count` of four words; their address is a multiple of their
        size."""

        def store_words(memory, index, first, second, third, fourth):
            values = np.asarray(getattr(memory, "_ary", memory))
            per_word = 4 // values.itemsize
            assert index % (count * per_word) == 0
            assert 0 <= index <= len(values) - count * per_word
            words = np.array([first, second, third, fourth][:count], np.uint32)
            values[index : index + count * per_word] = words.view(values.dtype)

        return store_words

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

    @intrinsic
    def float16_bits(typing_context, value):
        """float16 -> its bits as uint16."""

        def codegen(context, builder, signature, args):
            half = args[0]
            return half if half.type == ir.IntType(16) else builder.bitcast(half, ir.IntType(16))

        return types.uint16(types.float16), codegen

    @intrinsic
    def float16_from_bits(typing_context, bits):
        """The float16 with these bits (uint16)."""

        def codegen(context, builder, signature, args):
            stored = context.get_value_type(types.float16)
            return args[0] if stored == ir.IntType(16) else builder.bitcast(args[0], stored)

        return types.float16(types.uint16), codegen

    def _vector_at(context, builder, memory_type, memory, index, count):
        """A pointer to `count` words of 32 bits: in global memory, or in an array in shared memory."""
        if isinstance(memory_type, types.CPointer):
            base, space = memory, 0
        else:
            base, space = emit.shared_pointer(context, builder, memory_type, memory), emit.SHARED
        vector = ir.VectorType(ir.IntType(32), count)
        return builder.bitcast(builder.gep(base, [index]), ir.PointerType(vector, space))

    def load_words_of(count):
        """The function (memory, index) -> `count` words of 32 bits; their address is a multiple of their size."""

        @intrinsic
        def load_words(typing_context, memory, index):
            def codegen(context, builder, signature, args):
                pointer = _vector_at(context, builder, signature.args[0], args[0], args[1], count)
                vector = builder.load(pointer, align=4 * count)
                words = [builder.extract_element(vector, ir.Constant(ir.IntType(32), i)) for i in range(count)]
                return context.make_tuple(builder, signature.return_type, words)

            return types.UniTuple(types.uint32, count)(memory, types.int32), codegen

        return load_words

    def store_words_of(count):
        """The function (memory, index, words) that writes `count` of four words; their address is a multiple of their
        size."""

        @intrinsic
        def store_words(typing_context, memory, index, first, second, third, fourth):
            def codegen(context, builder, signature, args):
                pointer = _vector_at(context, builder, signature.args[0], args[0], args[1], count)
                vector = ir.Constant(ir.VectorType(ir.IntType(32), count), ir.Undefined)
                for i, word in enumerate(args[2 : 2 + count]):
                    vector = builder.insert_element(vector, word, ir.Constant(ir.IntType(32), i))
                builder.store(vector, pointer, align=4 * count)
                return context.get_dummy_value()

            return types.void(memory, types.int32, *[types.uint32] * 4), codegen

        return store_words

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
