"""What a Shiftwise layer looks like from outside: the attributes of an nn.Conv2d, and the plain kernels it equals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.forms import DenseKernel, add_kernels, dense_kernel, join_extents, join_kernels
from sw_transplant.geometry import BranchGeometry, Extent, Size, enclose
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.computed import ComputedTensor, Source, computed
from sw_transplant.layers.folding import keeps_statistics, total
from sw_transplant.layers.parameters import drop_hooks, take_over
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.ops.tracing import is_observed

COMPUTED = ("weight", "bias")
"""What a convolution has as parameters, and a layer computes."""
_FIXED = frozenset(
    {"kernel_size", "dilation", "padding", "padding_mode", "groups", "in_channels", "out_channels", "transposed"}
)
"""Settings of a convolution that a layer cannot follow when somebody changes them."""


class AsConv2d:
    """Mixin of the layers that are a sum of branches: everything here follows from the branches, the stride aside."""

    branches: Any
    stride: Size
    match: Any
    stated_padding: Any = None
    """The padding that the convolution stated whose place the layer took; None where it was none, or several."""
    flags: tuple[str, ...] = ()
    """Names of the plain attributes that the layer kept of what it replaced."""
    padding_mode = "zeros"
    transposed = False
    output_padding = (0, 0)

    def parts(self) -> Sequence[PlacedTiles]:
        """The branches, as what they are to the forms."""
        return list(self.branches)

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the module."""
        return self.branches[0].bank  # type: ignore[return-value]

    @property
    def _geometry(self) -> BranchGeometry:
        """That of the first branch: what it makes of a map's size, all branches make."""
        return self.branches[0].geometry  # type: ignore[return-value]

    @property
    def extent(self) -> Extent:
        """The one kernel that has every tap of every branch."""
        return reduce(enclose, [self.extent_on(branch, (1, 1)) for branch in self.parts()])

    def extent_on(self, branch: PlacedTiles, size: Size) -> Extent:
        """Where the kernel of one of the branches lies over a map of this size."""
        top, _, left, _ = branch.geometry.resolve(size, self.stride)
        return Extent(branch.geometry.kernel_size, (top, left), branch.geometry.dilation)

    @property
    def kernel_size(self) -> Size:
        """Taps of the one kernel that equals all branches."""
        return self.extent.kernel_size

    @property
    def dilation(self) -> Size:
        """Dilation of the one kernel that equals all branches."""
        return self.extent.dilation

    @property
    def padding(self) -> Any:
        """As it was written, where the layer took the place of one convolution: a pair, ``"same"`` or ``"valid"``.

        Else as in nn.Conv2d ``(vertical, horizontal)``; four sides, top to right, where they differ; ``"same"`` where
        they depend on the map (:attr:`pads_by_map`).
        """
        if self.stated_padding is not None:
            return self.stated_padding
        if self.pads_by_map:
            return "same"
        whole = self.extent
        grown = self.growth
        (top, left), (kh, kw), (dh, dw) = whole.origin, whole.kernel_size, whole.dilation
        bottom, right = grown[0] + dh * (kh - 1) - top, grown[1] + dw * (kw - 1) - left
        return (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)

    @property
    def pads_by_map(self) -> bool:
        """Whether the zeros around the map depend on its size (:data:`geometry.Padding`)."""
        return self._geometry.padding == "same" and self.stride != (1, 1)

    @property
    def growth(self) -> Size:
        """By how much the map grows at stride 1 (:attr:`geometry.BranchGeometry.growth`)."""
        return self._geometry.growth

    @property
    def weight(self) -> Tensor:
        """The one depthwise kernel ``(C_out, 1, kh, kw)`` that equals all branches, BatchNorm folded.

        It is computed for who reads it: what would write into it raises RuntimeError (:mod:`computed`). Write with
        :meth:`set_weight`, or assign an ``nn.Parameter``, whose values are laid out into the bank, and whose
        ``requires_grad``, attributes and hooks the bank takes over. Both need a layer that is one kernel
        (:meth:`reason_against_setting`). There, ``requires_grad``, ``grad`` and hooks of the weight are those of the
        bank, in the shape of the kernel.
        """
        return self._guarded("weight", reduce(add_kernels, self._dense()).weight)

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        self._check_parameter("weight", parameter)
        self.set_weight(parameter)
        branch = self.branches[0]
        drop_hooks(branch.bank)
        branch.bank.grad = None
        for name in list(vars(branch.bank)):
            delattr(branch.bank, name)
        if isinstance(parameter, ComputedTensor):  # of this layer, or of another one: values are all that it has
            branch.bank.requires_grad_(parameter.requires_grad)
        else:
            take_over(branch.bank, parameter, branch.layout)

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(C_out,)`` that goes with :attr:`weight`, BatchNorm folded; None for none.

        Of a layer that is one kernel, the Parameter itself, which can be exchanged; else computed, as :attr:`weight`.
        """
        bias = self._whole_bias()
        if bias is None or isinstance(bias, nn.Parameter):
            return bias
        return self._guarded("bias", bias)

    @bias.setter
    def bias(self, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            self._check_parameter("bias", parameter)
        self._exchange_bias(parameter)

    def reason_against_setting(self) -> str | None:
        """Why :meth:`set_weight` and :meth:`set_bias` cannot change the layer; None where they can.

        They can where the layer is one kernel that is laid out, as what took the place of a single ``nn.Conv2d``:
        without BatchNorm, edges or masks.
        """
        parts = self.parts()
        if len(parts) > 1:
            return f"the layer is the sum of {len(parts)} branches"
        if self.channel_order is not None:
            return "the layer exchanges channels"
        return parts[0].reason_against_setting()

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Lays a kernel out into the bank, in place: afterwards the layer is this kernel, and :attr:`weight` equals it.

        Args:
            weight: ``(C_out, 1, kh, kw)``; its values are copied, and cast to dtype and device of the bank.

        Raises:
            ValueError: another shape.
            NotImplementedError: the layer is not one kernel.
        """
        branch = self._one_kernel("set_weight")
        self._check_shape("set_weight", weight, (branch.bank.shape[0], 1, *branch.geometry.kernel_size))
        branch.bank.copy_(branch.layout.to_bank(weight))
        self.clear_cache()

    @torch.no_grad()
    def set_bias(self, bias: Tensor | None) -> None:
        """Sets the bias, in place where there is one.

        A layer that gets its first bias, or loses it, is no longer what it replaced: ``save`` refuses it.

        Args:
            bias: ``(C_out,)``; its values are copied, and cast to dtype and device of the bank. None for no bias.

        Raises:
            ValueError: another shape.
            NotImplementedError: the layer is not one kernel.
        """
        branch = self._one_kernel("set_bias")
        if bias is not None:
            self._check_shape("set_bias", bias, (branch.bank.shape[0],))
        if bias is None or branch.bias is None:
            self._exchange_bias(None if bias is None else nn.Parameter(bias.detach().to(branch.bank, copy=True)))
        else:
            branch.bias.copy_(bias)
            self.clear_cache()

    def _exchange_bias(self, bias: nn.Parameter | None) -> None:
        branch = self._one_kernel("bias")
        if bias is not None:
            self._check_shape("bias", bias, (branch.bank.shape[0],))
        if (bias is None) != (branch.bias is None):
            self.match = None  # it cannot be rebuilt from what it replaced
        branch.bias = bias
        self.clear_cache()

    def _one_kernel(self, what: str) -> Branch:
        if (reason := self.reason_against_setting()) is not None:
            raise NotImplementedError(
                f"{type(self).__name__}.{what}: {reason}, so that no single kernel can be laid out into it; change "
                "layer.branches, or merge(model) first and change the plain convolution"
            )
        return self.branches[0]  # type: ignore[no-any-return]

    def _guarded(self, name: str, tensor: Tensor) -> Tensor:
        if is_observed():  # by who takes plain tensors only
            return tensor
        reason, bank = self.reason_against_setting(), None
        if reason is None:
            remedy = f"write with layer.set_{name}(tensor), or assign layer.{name} = nn.Parameter(tensor)"
            if name == "weight":
                bank = (self.branches[0].bank, self.branches[0].layout)
        else:
            remedy = f"layer.set_{name}(tensor) does not serve here, as {reason}: change what layer.parameters() gives"
        return computed(tensor, Source(f"{type(self).__name__}.{name}", remedy, bank))

    def _check_parameter(self, name: str, value: object) -> None:
        if not isinstance(value, nn.Parameter):
            raise TypeError(
                f"{type(self).__name__}.{name}: cannot assign {torch.typename(value)}, expected nn.Parameter; "
                f"layer.set_{name}(tensor) takes the values of any tensor"
            )

    def _check_shape(self, what: str, tensor: object, expected: tuple[int, ...]) -> None:
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if shape != expected:
            raise ValueError(f"{type(self).__name__}.{what}: got {shape}, expected a tensor of shape {expected}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "_planner" in self.__dict__:
            if value != getattr(self, name):
                raise AttributeError(
                    f"{type(self).__name__}.{name}: cannot be set to {value!r}, it follows from how the tiles are "
                    "placed; set it before converting, or on what merge(model) gives"
                )
        elif name in COMPUTED:  # properties, which nn.Module would not look for
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
            if name == "stride" and "_planner" in self.__dict__:
                self.clear_cache()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module, but for what pruning and norms would put in the place of a weight that is not there."""
        if name.startswith(("weight", "bias")):
            self._show_slots()  # which a norm has removed by now
            raise self._refusal_of_parameters(f"got a parameter {name!r}")
        super().register_parameter(name, param)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        if name in COMPUTED:  # by parametrizations, which would put another one in its place
            raise self._refusal_of_parameters(f"{name!r} is to be taken away or parametrized")
        super().__delattr__(name)

    def _show_slots(self) -> None:
        """Empty slots, as an nn.Conv2d has for a bias that it does without: what norms and parametrizations look for.

        They then go on to where the layer can refuse them; without the slots they end in a KeyError.
        """
        self._parameters: dict[str, nn.Parameter | None]
        for name in COMPUTED:
            self._parameters.setdefault(name, None)

    def _refusal_of_parameters(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}: {what}, expected no parameter beside the banks of its branches, from which its "
            "weight is computed; prune, normalise or parametrize these (layer.branches[0], 'bank'), set the weight by "
            "layer.set_weight(tensor), or merge(model) first and change the plain convolution"
        )

    def _whole_bias(self) -> Tensor | None:
        return total([branch.folded_bias() for branch in self.parts()], self._like.dtype)

    def clear_cache(self) -> None:
        """Forgets what was made of the parameters."""
        raise NotImplementedError

    def _dense(self) -> list[DenseKernel]:
        return [
            dense_kernel(placed)
            for branch in self.parts()
            for placed in branch.placed(self.extent_on(branch, (1, 1)).origin, fold=True)
        ]

    def out_size(self, size: Size) -> Size:
        """Size of the output map for an input map ``(H, W)``."""
        return self._geometry.out_size(size, self.stride)

    @property
    def channel_order(self) -> Tensor | None:
        """Which input channel the k-th channel of :meth:`kernels` reads, ``(C_in,)``; None for the k-th itself."""
        return None

    def trained(self) -> tuple[list[bool], bool]:
        """Whether each of :meth:`kernels` is made of anything that requires gradients, and whether their bias is."""
        branches = self.parts()
        owners = [branch for branch in branches for _ in range(len(branch.index))]
        groups = join_extents([kernel.extent for kernel in self._dense()])
        kernels = [any(owners[i].trained[0] for i in members) for _, members in groups]
        return kernels, any(branch.trained[1] for branch in branches)

    def kernels(self) -> tuple[list[DenseKernel], Tensor | None]:
        """The plain convolutions that this module equals in eval: as few kernels as add no work, and one bias.

        Raises:
            NotImplementedError: a BatchNorm keeps no running statistics, so that there is nothing to fold.
        """
        for i, branch in enumerate(self.parts()):
            if branch.bn is not None and not keeps_statistics(branch.bn):
                raise NotImplementedError(
                    f"ShiftwiseConv2d: the BatchNorm of branch {i} has no running statistics to fold; "
                    "expected track_running_stats=True"
                )
        return join_kernels(self._dense()), self._whole_bias()
