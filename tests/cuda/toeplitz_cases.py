"""The layers that the Toeplitz kernels are for: SLaK, SW, RepLKNet, UniRepLKNet, ConvNeXt; and detection's sizes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sw_transplant.cuda.toeplitz.division import Device
from sw_transplant.cuda.toeplitz.gradient.plan import GradientPlan
from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan
from sw_transplant.cuda.toeplitz.plan import Plan, unit, widest_vector
from sw_transplant.cuda.toeplitz.settings import choose_plan

MATHS = ["tf32", "tf32x3", "float16", "bfloat16"]
DEVICES = {
    (9, 0): Device(132, 227 * 1024, 228 * 1024),
    (10, 0): Device(148, 227 * 1024, 228 * 1024),
    (8, 0): Device(108, 163 * 1024, 164 * 1024),
    (8, 6): Device(84, 99 * 1024, 100 * 1024, warps=48, blocks=16),
}


def plan_of_gpu(choose: Callable[..., Any], x: Tensor, sizes: Any, origins: Any, channels_last: bool) -> Any:
    """The plan that an sm_90 would get for a map of a self-test, which is in the memory format that is tested."""
    assert (not x.is_contiguous()) == channels_last
    vector = widest_vector("tf32", x.shape[1] if channels_last else x.shape[3])
    plan = choose("tf32", x.shape[2:], tuple(sizes), tuple(origins), DEVICES[9, 0], vector, channels_last=channels_last)
    assert plan is not None
    assert not channels_last or plan.channels < x.shape[1]
    return plan


@dataclass(frozen=True)
class Layer:
    """A map and the dense kernels over it, centred."""

    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        kernels = "+".join(f"{kh}x{kw}" for kh, kw in self.sizes)
        return f"{self.size[0]}x{self.size[1]}-{kernels}"

    @property
    def origins(self) -> tuple[tuple[int, int], ...]:
        return tuple((kh // 2, kw // 2) for kh, kw in self.sizes)

    def plan(self, math: str, capability: tuple[int, int] = (9, 0), channels: int = 0) -> Plan | None:
        """The plan for contiguous maps, or for channels_last ones of so many channels."""
        return choose_plan(*self._arguments(math, capability, channels))

    def gradient_plan(
        self, math: str, capability: tuple[int, int] = (9, 0), channels: int = 0, **division: Any
    ) -> GradientPlan | None:
        """The plan for the gradients of the kernels, with another division of the work where one is given."""
        plan = choose_gradient_plan(*self._arguments(math, capability, channels))
        return replace(plan, **division) if plan is not None else None

    def _arguments(self, math: str, capability: tuple[int, int], channels: int) -> tuple[Any, ...]:
        vector = widest_vector(math, channels) if channels else 0
        return math, self.size, self.sizes, self.origins, DEVICES[capability], vector, channels > 0


@dataclass(frozen=True)
class Tiles:
    """A division of the map that is not the chosen one: small enough to simulate, yet with several warps or tiles."""

    blocks: int
    parts: int
    columns: int
    whole: bool = False  # one tile for all of the map, without a halo

    def applied(self, plan: Plan, size: tuple[int, int]) -> Plan:
        starts = [-max([k.origin[axis] for k in plan.kernels if k.axis == axis], default=0) for axis in (0, 1)]
        starts[1] -= starts[1] % unit(plan.math)
        return replace(
            plan,
            whole=size if self.whole else (None, None),
            blocks=self.blocks,
            parts=self.parts,
            columns=self.columns,
            planes=plan.planes if plan.channels_last else 1,
            registers=168,
            origins=(0, 0) if self.whole else (starts[0], starts[1]),
        )


def strips(long: int, short: int, *more: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return ((long, short), (short, long), *more)


LAYERS = [
    Layer((56, 56), strips(51, 5)),
    Layer((28, 28), strips(49, 5)),
    Layer((14, 14), strips(47, 5)),
    Layer((7, 7), strips(13, 5)),
    Layer((56, 56), strips(51, 3)),
    Layer((56, 56), strips(51, 5, (5, 5))),
    Layer((56, 56), ((31, 31),)),
    Layer((28, 28), ((29, 29),)),
    Layer((14, 14), ((27, 27),)),
    Layer((28, 28), ((13, 13),)),
    Layer((14, 14), ((13, 13),)),
    Layer((56, 56), ((7, 7),)),
    Layer((28, 28), ((7, 7),)),
    Layer((200, 336), strips(51, 5)),
    Layer((100, 168), strips(49, 5)),
    Layer((200, 336), ((31, 31),)),
    Layer((200, 336), ((7, 7),)),
    Layer((512, 2048), strips(51, 5)),
    Layer((55, 57), strips(51, 5)),
    Layer((48, 48), strips(51, 5)),
    Layer((64, 64), strips(51, 5)),
    Layer((72, 72), strips(51, 5)),
    Layer((96, 96), ((31, 31),)),
    Layer((24, 80), strips(51, 5)),
    Layer((80, 24), strips(51, 5)),
]
