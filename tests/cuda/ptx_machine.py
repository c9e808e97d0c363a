"""A small interpreter of PTX, for the integer and float instructions that the Toeplitz kernels are compiled to.

It runs what the GPU's assembler would be given: one warp at a time, every register a NumPy array with one element for
each lane. Lanes that went different ways wait for each other at the lowest line of the program, which is where
compilers put the place they meet. Instructions for whole warps ask for all 32 lanes; memory is checked for bounds and
alignment.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from tests.cuda.lockstep import ROW, WORD, Lockstep, transpose

SHARED_BASE = 1024  # not zero: an address of another space would be noticed
LANES = 32
TYPES = {
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.float16, "u32": np.uint32, "s32": np.int32,
    "b32": np.uint32, "f32": np.float32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
}  # fmt: skip
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge, "nan": lambda a, b: np.isnan(a) | np.isnan(b)}  # fmt: skip
ARITHMETIC: dict[str, Callable] = {"add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_,
              "xor": operator.xor, "min": np.minimum, "max": np.maximum, "div": operator.floordiv,
              "rem": operator.mod}  # fmt: skip


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor, contiguous or channels_last: float32, or both 16-bit types as uint16."""
    flat = (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).flatten()
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.int16).numpy().view(np.uint16)


class Program:
    """The instructions of the one kernel in a PTX text."""

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index(".entry") :]
        self.parameters = re.findall(r"\.param \.(\w+)\s+(\w+)", body[: body.index(")")])
        self.lines: list[tuple[str | None, bool, str, list[str]]] = []
        self.labels: dict[str, int] = {}
        text = re.sub(r"//[^\n]*", "", body[body.index("{") + 1 : body.rindex("}")])
        for statement in re.sub(r"(\$?\w+):(?=\s)", r"\1:;", text).split(";"):
            statement = statement.strip()
            if not statement or statement.startswith("."):
                continue
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.lines)
                continue
            guard = re.match(r"@(!?)(%p\d+)\s+", statement)
            if guard:
                statement = statement[guard.end() :]
            name, _, rest = statement.partition(" ") if " " in statement else statement.partition("\t")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            self.lines.append((guard and guard[2], bool(guard and guard[1]), name.strip(), operands))


class Machine:
    """Global memory, and launches of one program."""

    def __init__(self, program: Program, shared_bytes: int, ops: type[Lockstep] = Lockstep) -> None:
        """ops: how matrix products are added up."""
        self.program, self.shared_bytes, self.ops = program, shared_bytes, ops
        self.buffers: list[tuple[int, np.ndarray]] = []
        self.executed: Counter[str] = Counter()

    def address(self, memory: np.ndarray) -> int:
        """Where a flat array lies in global memory."""
        base = (len(self.buffers) + 1) << 36
        self.buffers.append((base, memory))
        return base

    def note(self, operation: str, space: str, addresses: np.ndarray, nbytes: int) -> None:
        """Called for what an instruction does to memory: `nbytes` at the address of each lane that is active."""

    def launch(self, grid: int, threads: int, arguments: list[int]) -> None:
        shared = np.full(self.shared_bytes // 4, 0xFFFFFFFF, np.uint32)
        for block in range(grid):
            warps = [Warp(self, shared, block, warp, arguments) for warp in range(threads // LANES)]
            while warps:
                for warp in warps:
                    warp.run()
                warps = [warp for warp in warps if not warp.done]  # the others are at the barrier

    def find(self, addresses: np.ndarray, nbytes: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffer in which `nbytes` at each address lie, and how far they are from its beginning."""
        for base, memory in self.buffers:
            if base <= addresses[0] < base + memory.nbytes:
                offsets = (addresses - np.uint64(base)).astype(np.int64)
                assert 0 <= offsets.min(), "before the memory of a tensor"
                assert offsets.max() + nbytes <= memory.nbytes, "beyond the memory of a tensor"
                return memory, offsets
        raise AssertionError(f"address {addresses[0]:#x} is in no tensor")


class Warp:
    def __init__(self, machine: Machine, shared: np.ndarray, block: int, warp: int, arguments: list[int]) -> None:
        self.machine, self.program, self.shared = machine, machine.program, shared
        self.registers: dict[str, np.ndarray] = {}
        self.at = np.zeros(LANES, np.int64)
        self.done = False
        self.special = {
            "%tid.x": np.arange(LANES) + LANES * warp,
            "%ctaid.x": np.full(LANES, block),
            "%dynamic_smem_size": np.full(LANES, machine.shared_bytes),
        }
        self.arguments = {name: value for (_, name), value in zip(machine.program.parameters, arguments, strict=True)}

    def run(self) -> None:
        """Until a barrier or the end."""
        with np.errstate(all="ignore"):
            while True:
                place = int(self.at.min())
                mask = self.at == place
                guard, negated, name, operands = self.program.lines[place]
                self.machine.executed[name] += 1
                self.at[mask] += 1
                active = mask
                if guard is not None:
                    condition = self.registers[guard] != 0
                    active = mask & (~condition if negated else condition)
                if name.startswith("bra"):
                    self.at[active] = self.program.labels[operands[0]]
                elif name == "ret":
                    assert mask.all(), "lanes end apart"
                    self.done = True
                    return
                elif name.startswith("bar.sync"):
                    assert mask.all(), "a barrier for part of a warp"
                    return
                elif active.any():
                    self.execute(name, operands, active)

    def execute(self, name: str, operands: list[str], active: np.ndarray) -> None:
        operation, *modifiers = name.split(".")
        if operation == "mma":
            assert active.all(), "a product for part of a warp"
            math = {"tf32": "tf32", "f16": "float16", "bf16": "bfloat16"}[modifiers[-2]]
            d, a, b, c = (self._group(operand) for operand in operands)
            words = [[self.read(r, "b32") for r in group] for group in (a, b)]
            sums = self.machine.ops(None, math).mma(*words, [self.read(r, "f32") for r in c])
            for register, value in zip(d, sums, strict=True):
                self.write(register, value, active)
        elif operation == "ldmatrix":
            assert active.all(), "a matrix load for part of a warp"
            results = self._group(operands[0])
            assert f"x{len(results)}" in modifiers
            addresses = self._address(operands[1])[: 8 * len(results)]  # of the other lanes no address is read
            assert (addresses % np.uint64(16) == 0).all(), "rows of a matrix begin at multiples of 16 bytes"
            for i, register in enumerate(results):
                word = (addresses[8 * i + ROW].astype(np.int64) - SHARED_BASE) // 4 + WORD
                assert 0 <= word.min()
                words = self.shared[word]
                self.machine.note("ldmatrix", "shared", addresses[8 * i : 8 * i + 8], 16)
                self.write(register, transpose(words) if "trans" in modifiers else words, active)
        elif operation in ("ld", "st"):
            self._memory(operation, modifiers, operands, active)
        else:
            self.write(operands[0], self._value(operation, modifiers, operands[1:]), active)

    def _value(self, operation: str, modifiers: list[str], operands: list[str]) -> np.ndarray:
        kind = modifiers[-1]
        if operation == "setp":
            return COMPARE[modifiers[0]](*(self.read(o, kind) for o in operands))
        if operation == "selp":
            first, second = (self.read(o, kind) for o in operands[:2])
            return np.where(self.registers[operands[2]] != 0, first, second)
        if operation == "cvt":
            if modifiers == ["rna", "tf32", "f32"]:
                bits = self.read(operands[0], "b32")
                finite = np.isfinite(bits.view(np.float32))
                return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)
            return self.read(operands[0], kind).astype(TYPES[modifiers[-2]])
        if operation in ("mov", "cvta"):
            return self.read(operands[0], "u64" if operation == "cvta" else kind)
        if kind == "pred":
            values = [self.read(o, kind) for o in operands]
            return ~values[0] if operation == "not" else ARITHMETIC[operation](*values)
        values = [self.read(o, kind) for o in operands]
        if operation in ("shl", "shr"):
            return getattr(np, {"shl": "left_shift", "shr": "right_shift"}[operation])(
                values[0], self.read(operands[1], "u32").astype(values[0].dtype)
            )
        if operation == "dp2a":  # two products of 16 and 8 bits, and a sum
            first, second, total = values
            second = second >> np.uint32(16 if modifiers[0] == "hi" else 0)
            low = (first & np.uint32(0xFFFF)) * (second & np.uint32(0xFF))
            return total + low + (first >> np.uint32(16)) * (second >> np.uint32(8) & np.uint32(0xFF))
        if operation == "bfi":  # so many bits of one word at this place of another
            field, word, place, length = values
            mask = (np.uint32(1) << length) - np.uint32(1) << place
            return word & ~mask | field << place & mask
        if operation == "prmt":  # four bytes, each chosen of eight by a digit
            both = values[0].astype(np.uint64) | values[1].astype(np.uint64) << np.uint64(32)
            digits = [values[2] >> np.uint32(4 * i) & np.uint32(0xF) for i in range(4)]
            assert all((digit < 8).all() for digit in digits), "the copying of a sign"
            chosen = [both >> digit.astype(np.uint64) * np.uint64(8) & np.uint64(0xFF) for digit in digits]
            return sum(byte << np.uint64(8 * i) for i, byte in enumerate(chosen)).astype(np.uint32)
        if operation == "not":
            return ~values[0]
        if operation == "neg":
            return -values[0]
        if operation in ("mul", "mad"):
            if modifiers[0] == "hi":  # the upper half of a product of 64 bits
                wide = [value.astype(np.int64 if kind[0] == "s" else np.uint64) for value in values[:2]]
                return (wide[0] * wide[1] >> wide[0].dtype.type(32)).astype(TYPES[kind])
            if modifiers[0] == "wide":
                kind = kind[0] + str(2 * int(kind[1:]))
                values[:2] = (value.astype(TYPES[kind]) for value in values[:2])
            product = values[0] * values[1]
            return product + self.read(operands[2], kind) if operation == "mad" else product
        return ARITHMETIC[operation](*values)

    def _memory(self, operation: str, modifiers: list[str], operands: list[str], active: np.ndarray) -> None:
        space, kind = modifiers[0], TYPES[modifiers[-1]]
        if space == "param":
            name = operands[1].strip("[]")
            self.write(operands[0], np.full(LANES, self.arguments[name], np.uint64).astype(kind), active)
            return
        place, registers = operands if operation == "st" else operands[::-1]
        size = np.dtype(kind).itemsize
        group = self._group(registers) if registers.startswith("{") else [registers]
        addresses = self._address(place)[active]
        assert (addresses % np.uint64(size * len(group)) == 0).all(), "not aligned"
        if space == "shared":
            memory, offsets = self.shared, addresses.astype(np.int64) - SHARED_BASE
            assert 0 <= offsets.min(), "before shared memory"
            assert offsets.max() + size * len(group) <= memory.nbytes, "beyond shared memory"
        else:
            memory, offsets = self.machine.find(addresses, size * len(group))
        self.machine.note(operation, space, addresses, size * len(group))
        elements = memory[: memory.nbytes // size * size // memory.itemsize].view(UNSIGNED[size])
        for i, register in enumerate(group):
            where = offsets // size + i
            if operation == "st":
                elements[where] = self.read(register, modifiers[-1])[active].view(UNSIGNED[size])
            else:
                value = np.zeros(LANES, UNSIGNED[size])
                value[active] = elements[where]
                self.write(register, value, active)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """A register, a special one, a constant or the address of shared memory, as this type."""
        if kind == "pred":
            return self.registers[operand] != 0 if operand.startswith("%") else np.full(LANES, int(operand, 0) != 0)
        dtype = np.dtype(TYPES[kind])
        if operand in self.special:
            return self.special[operand].astype(dtype)
        if operand.startswith("%"):
            bits = self.registers[operand].astype(UNSIGNED[dtype.itemsize])
            return bits.view(dtype)
        if operand.startswith("{"):  # two halves
            low, high = (self.read(register, "b16").astype(np.uint32) for register in self._group(operand))
            return (low | high << np.uint32(16)).view(dtype)
        if operand.startswith("0f"):
            return np.full(LANES, int(operand[2:], 16), np.uint32).view(dtype)
        if "smem" in operand:
            return np.full(LANES, SHARED_BASE, dtype)
        value = np.array(int(operand, 0) & (2 ** (8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize])
        return np.full(LANES, value).view(dtype)

    def write(self, register: str, value: np.ndarray, active: np.ndarray) -> None:
        if register.startswith("{"):
            for i, half in enumerate(self._group(register)):
                self.write(half, (value >> np.uint32(16 * i)).astype(np.uint16), active)
            return
        value = np.asarray(value)
        bits = value if value.dtype == bool else np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize])
        stored = self.registers.setdefault(register, np.zeros(LANES, np.uint64))
        stored[active] = bits[active].astype(np.uint64)

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        address = self.read(base, "u32" if base.startswith("%r") and not base.startswith("%rd") else "u64")
        return (address.astype(np.int64) + int(offset or 0)).astype(np.uint64)

    def _group(self, operand: str) -> list[str]:
        return [register.strip() for register in operand.strip("{} ").split(",")]
