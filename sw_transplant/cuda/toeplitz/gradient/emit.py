# mypy: disallow-untyped-defs=False
"""The products of the weight gradient as instructions: device functions for its kernel."""

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic

from sw_transplant.cuda.toeplitz.emit import Emitter, Index, data_pointer
from sw_transplant.cuda.toeplitz.gradient.plan import GradientPlan
from sw_transplant.cuda.toeplitz.gradient.product import multiply, spread


def device_gradients(plan: GradientPlan) -> tuple[Any, Any, Any]:
    """Three functions for kernels, with words the array of all shared memory and int32 otherwise: `no_sums(words)`, a
    tuple of zeros; `add_products(words, sums, plane, lane, group, part)`, the new sums; and
    `spread_sums(words, sums, scratch, lane, which)`."""
    sums_type = types.UniTuple(types.float32, plan.sums)

    @intrinsic
    def no_sums(typing_context, words):
        def codegen(context, builder, signature, args):
            ops = Emitter(builder, plan.math, data_pointer(context, builder, signature.args[0], args[0]))
            return context.make_tuple(builder, signature.return_type, [ops.nothing()] * plan.sums)

        return sums_type(words), codegen

    @intrinsic
    def add_products(typing_context, words, sums, plane, lane, group, part):
        def codegen(context, builder, signature, args):
            ops = Emitter(builder, plan.math, data_pointer(context, builder, signature.args[0], args[0]))
            before = [builder.extract_value(args[1], i) for i in range(plan.sums)]
            after = multiply(ops, plan, before, *(Index(builder, value) for value in args[2:]))
            return context.make_tuple(builder, signature.return_type, after)

        return sums_type(words, sums_type, *[types.int32] * 4), codegen

    @intrinsic
    def spread_sums(typing_context, words, sums, scratch, lane, which):
        def codegen(context, builder, signature, args):
            ops = Emitter(builder, plan.math, data_pointer(context, builder, signature.args[0], args[0]))
            values = [builder.extract_value(args[1], i) for i in range(plan.sums)]
            spread(ops, plan, values, *(Index(builder, value) for value in args[2:]))
            return context.get_dummy_value()

        return types.void(words, sums_type, *[types.int32] * 3), codegen

    return no_sums, add_products, spread_sums
