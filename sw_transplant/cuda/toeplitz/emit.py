# mypy: disallow-untyped-defs=False
"""The products as instructions of the GPU: what `multiply` and `spread` mean when a kernel is compiled."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from sw_transplant.cuda.toeplitz.plan import Plan
from sw_transplant.cuda.toeplitz.product import multiply, spread

_i32, _f32 = ir.IntType(32), ir.FloatType()
_TOGETHER = ("convergent",)  # all lanes of a warp: not to be moved to where some of them are alone
SHARED = 3  # the address space of shared memory
_PRODUCTS = {
    "tf32": "m16n8k8.row.col.f32.tf32.tf32.f32",
    "tf32x3": "m16n8k8.row.col.f32.tf32.tf32.f32",
    "float16": "m16n8k16.row.col.f32.f16.f16.f32",
    "bfloat16": "m16n8k16.row.col.f32.bf16.bf16.f32",
}


def round_to_tf32(builder: Any, value: Any) -> Any:
    """float -> bits of the nearest TF32 number, ties away from zero."""
    return builder.call(ir.InlineAsm(ir.FunctionType(_i32, [_f32]), "cvt.rna.tf32.f32 $0, $1;", "=r,f"), [value])


class Index:
    """A 32-bit LLVM value that is added to, multiplied and shifted like a number."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _apply(self, operation: str, other: Any) -> "Index":
        other = other.value if isinstance(other, Index) else ir.Constant(_i32, other)
        return Index(self.builder, getattr(self.builder, operation)(self.value, other))

    def __add__(self, other: Any) -> "Index":
        return self._apply("add", other)

    def __sub__(self, other: Any) -> "Index":
        return self._apply("sub", other)

    def __mul__(self, other: Any) -> "Index":
        return self._apply("mul", other)

    def __rshift__(self, other: Any) -> "Index":
        return self._apply("lshr", other)

    def __and__(self, other: Any) -> "Index":
        return self._apply("and_", other)


class Emitter:
    """The `ops` of product.py. An operand is a list of words: one, or its upper and lower part for "tf32x3"."""

    def __init__(self, builder: Any, math: str, memory: Any) -> None:
        """memory: pointer to the words of shared memory, in any address space."""
        self.builder, self.math = builder, math
        self.memory = builder.addrspacecast(memory, ir.PointerType(_i32, SHARED))

    def nothing(self) -> Any:
        return ir.Constant(_f32, 0.0)

    def no_operand(self) -> list[Any]:
        return [ir.Constant(_i32, 0)] * (2 if self.math == "tf32x3" else 1)

    def load(self, at: Index, offset: int) -> list[Any]:
        return self._operand(self.builder.load(self._pointer(at, offset)))

    def load_matrix(self, at: Index, offset: int, count: int = 4, transposed: bool = False) -> list[list[Any]]:
        """`count` matrices of 8 rows of 4 words; 8 lanes each give the rows' addresses. Lane l gets word l & 3 of row
        l >> 2; `transposed`, that of the matrix of 8 x 8 values of 16 bits with rows and columns swapped."""
        outputs = ",".join(f"${i}" for i in range(count))
        # Said to touch memory, lest it be moved over a barrier; the assembler knows better and orders it freely.
        asm = ir.InlineAsm(
            ir.FunctionType(ir.LiteralStructType([_i32] * count), [_i32]),
            f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 "
            f"{{{outputs}}}, [${count}+{4 * offset}];",
            "=r," * count + "r,~{memory}",
            side_effect=True,
        )
        address = self.builder.ptrtoint(self._pointer(at, 0), _i32)
        words = self.builder.call(asm, [address], attrs=_TOGETHER)
        return [self._operand(self.builder.extract_value(words, i)) for i in range(count)]

    def splice(self, first: list[Any], second: list[Any]) -> list[Any]:
        """The upper value of one word of two, and the lower value of the other."""
        asm = ir.InlineAsm(ir.FunctionType(_i32, [_i32, _i32]), "prmt.b32 $0, $1, $2, 0x5432;", "=r,r,r")
        return [self.builder.call(asm, [*first, *second])]

    def mma(self, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[Any]:
        sums = list(c)
        # The small products first. Lower times lower is below the last bit of the sum.
        for i, j in [(1, 0), (0, 1), (0, 0)] if self.math == "tf32x3" else [(0, 0)]:
            sums = self._mma([word[i] for word in a], [word[j] for word in b], sums)
        return sums

    def add(self, first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
        return [self.builder.fadd(a, b) for a, b in zip(first, second, strict=True)]

    def repeat(
        self, times: int, body: Callable[..., list[Any]], state: list[Any], first: "Index | int" = 0, by: int = 1
    ) -> list[Any]:
        """state = body(number, state) for number = first, first + by, ... below times; at least once."""
        builder = self.builder
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        number = builder.phi(_i32)
        carried = [builder.phi(value.type) for value in state]
        result = body(Index(builder, number), carried)
        following = builder.add(number, ir.Constant(_i32, by))
        begin = first.value if isinstance(first, Index) else ir.Constant(_i32, first)
        for phi, value, later in zip([number, *carried], [begin, *state], [following, *result], strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(later, builder.block)
        again = builder.cbranch(builder.icmp_unsigned("<", following, ir.Constant(_i32, times)), loop, after)
        # Not unrolled: its body is long enough, and a longer one needs more registers than there are.
        disable = builder.module.add_metadata(["llvm.loop.unroll.disable"])
        identity = builder.module.add_metadata([disable])
        identity.operands = (identity, disable)  # a loop is told from others by metadata that names itself
        again.set_metadata("llvm.loop", identity)
        builder.position_at_end(after)
        return result

    def choose(
        self, which: Index, variants: Sequence[Callable[[], list[Any]]], table: Sequence[int] | None = None
    ) -> list[Any]:
        """The result of variant number table[which], or number `which`."""
        table = range(len(variants)) if table is None else table
        if len(variants) == 1:
            return variants[0]()
        builder = self.builder
        cases, after = [builder.append_basic_block() for _ in variants], builder.append_basic_block()
        switch = builder.switch(which.value, cases[table[0]])
        for number, variant_number in enumerate(table):
            if number:
                switch.add_case(ir.Constant(_i32, number), cases[variant_number])
        ends = []
        for case, variant in zip(cases, variants, strict=True):
            builder.position_at_end(case)
            ends.append((variant(), builder.block))
            builder.branch(after)
        builder.position_at_end(after)
        merged = [builder.phi(value.type) for value in ends[0][0]]
        for (values, block), (i, phi) in itertools.product(ends, enumerate(merged)):
            phi.add_incoming(values[i], block)
        return merged

    def store_pair(self, at: Index, offset: int, first: Any, second: Any) -> None:
        """Two neighbouring sums; the address is even."""
        pair_type = ir.VectorType(_f32, 2)
        pair: Any = ir.Constant(pair_type, ir.Undefined)
        for i, value in enumerate((first, second)):
            pair = self.builder.insert_element(pair, value, ir.Constant(_i32, i))
        pointer = self.builder.bitcast(self._pointer(at, offset), ir.PointerType(pair_type, SHARED))
        self.builder.store(pair, pointer, align=8)

    def _pointer(self, at: Index, offset: int) -> Any:
        pointer = self.builder.gep(self.memory, [at.value])
        return self.builder.gep(pointer, [ir.Constant(_i32, offset)])

    def _operand(self, word: Any) -> list[Any]:
        if self.math != "tf32x3":
            return [word]
        value = self.builder.bitcast(word, _f32)
        upper = round_to_tf32(self.builder, value)
        return [upper, round_to_tf32(self.builder, self.builder.fsub(value, self.builder.bitcast(upper, _f32)))]

    def _mma(self, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[Any]:
        asm = ir.InlineAsm(
            ir.FunctionType(ir.LiteralStructType([_f32] * 4), [_i32] * 6 + [_f32] * 4),
            f"mma.sync.aligned.{_PRODUCTS[self.math]} "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        )
        d = self.builder.call(asm, [*a, *b, *c], attrs=_TOGETHER)
        return [self.builder.extract_value(d, i) for i in range(4)]


def device_products(plan: Plan) -> tuple[Any, Any]:
    """Two functions for kernels: `products(words, plane, taps, lane, part) -> sums`, a tuple, and
    `spread_sums(words, sums, plane, lane, part)`; words is the array of all shared memory, the others are int32."""
    sums_type = types.UniTuple(types.float32, 4 * plan.columns * plan.blocks)

    @intrinsic
    def products(typing_context, words, plane, taps, lane, part):
        def codegen(context, builder, signature, args):
            ops = Emitter(builder, plan.math, data_pointer(context, builder, signature.args[0], args[0]))
            sums = multiply(ops, plan, *(Index(builder, value) for value in args[1:]))
            return context.make_tuple(builder, signature.return_type, sums)

        return sums_type(words, *[types.int32] * 4), codegen

    @intrinsic
    def spread_sums(typing_context, words, sums, plane, lane, part):
        def codegen(context, builder, signature, args):
            ops = Emitter(builder, plan.math, data_pointer(context, builder, signature.args[0], args[0]))
            values = [builder.extract_value(args[1], i) for i in range(len(sums_type))]
            spread(ops, plan, values, *(Index(builder, value) for value in args[2:]))
            return context.get_dummy_value()

        return types.void(words, sums_type, *[types.int32] * 3), codegen

    return products, spread_sums


def data_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Where the elements of an array lie."""
    return context.make_array(array_type)(context, builder, array).data


def shared_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """The same as an address of shared memory, which an array there has."""
    pointer = data_pointer(context, builder, array_type, array)
    return builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, SHARED))
