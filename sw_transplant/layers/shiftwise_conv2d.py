"""ShiftwiseConv2d: a large depthwise convolution, or a sum of parallel ones, as banks of small tiles and placements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.fx
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from sw_transplant.config import read_guarantee
from sw_transplant.forms.dispatch import Decision, check_form, check_nonfinite
from sw_transplant.geometry import BranchGeometry, Size
from sw_transplant.layers.as_conv2d import AsConv2d
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.frozen import Frozen, without_buffers
from sw_transplant.layers.parameters import take_attributes
from sw_transplant.layers.planner import Planner
from sw_transplant.layers.recompute import Recompute

STRANGE = "_is_strange_to_its_class"
"""Attribute of a module, True where its weights have other names or shapes than those that the class of the model
makes there: a loader that goes by the class would leave them random."""


class ShiftwiseConv2d(AsConv2d, nn.Module):
    """A sum of depthwise branches, each a bank of n x n tiles whose responses are shifted, added and normalised.

        y = sum over branches k of BN_k( sum over placements (t, dy, dx) of (x * tile t) shifted by (dy, dx) )

    Takes the place of a depthwise ``nn.Conv2d`` or of a module whose forward is a sum of such (the paper, "Method";
    SLaK's ``ReparamLargeKernelConv``). Its parameters are raw tensors, so that initialisers which look for
    ``nn.Conv2d`` leave them alone. While every BatchNorm uses running statistics (eval), all branches are folded into
    one and the tensors that run are cached until a parameter, a buffer, the mode, the dtype or the device changes.
    A write through ``tensor.data`` cannot be seen; call :meth:`clear_cache` after one.

    Args:
        in_channels: channels of the input map; equals ``groups``.
        out_channels: a multiple of ``in_channels``.
        stride: of the output, ``(sh, sw)``, the same for every branch.
        branches: at least one :class:`Branch`.
        form: how it runs: ``"auto"`` or a form of :mod:`sw_transplant.forms`. Assignable.
        match: what the module replaced, kept for ``save`` (a :class:`sw_transplant.find.search.Match`).

    Shape: ``(B, C_in, H, W)`` or ``(C_in, H, W)`` to the same with C_out channels, as ``nn.Conv2d``. The dtype is that
    of the bank; the output is channels_last where the input or the module is, as that of nn.Conv2d.

    Raises:
        ValueError: branches that do not fit together, an unknown form, an input of the wrong shape.
    """

    spec: Any = None
    """How the paper's module was made (:class:`approximate.SharedSpec`), where this is one that ``convert`` put in."""
    origin: Any = None
    """What the module replaced, without its weights (:class:`origin.Origin`), where that can be made again."""
    recompute: Recompute = "none"
    """Which branches' responses are computed again in the backward pass instead of being kept for their BatchNorm:
    ``"none"``, ``"small"`` (those with at most a quarter of the largest one's taps) or ``"all"``. Assignable. The
    gradients are the same, bit for bit. Compiled code and form "shift" keep everything."""

    _frozen: Frozen | None = None
    _takes_shortcuts = True
    """Whether what the planner gives is the whole forward pass."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Size,
        branches: Sequence[Branch],
        *,
        form: str = "auto",
        match: Any = None,
    ) -> None:
        super().__init__()
        if not branches:
            raise ValueError("ShiftwiseConv2d: no branches, expected at least one")
        for i, branch in enumerate(branches):
            if branch.bank.shape[0] != out_channels:
                raise ValueError(
                    f"ShiftwiseConv2d: bank of branch {i} has {branch.bank.shape[0]} channels, expected {out_channels}"
                )
        self._set_up(in_channels, out_channels, stride, form, match)
        self.branches = nn.ModuleList(branches)
        self._check_sizes()

    def _set_up(self, in_channels: int, out_channels: int, stride: Size, form: str, match: Any) -> None:
        """Everything but the branches."""
        if in_channels < 1 or out_channels < 1 or out_channels % in_channels:
            raise ValueError(
                f"ShiftwiseConv2d: out_channels {out_channels}, expected a multiple of in_channels {in_channels}"
            )
        if len(stride) != 2 or min(stride) < 1:
            raise ValueError(f"ShiftwiseConv2d: stride {stride}, expected two integers of at least 1")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, in_channels
        self.stride: Size = (stride[0], stride[1])
        self._planner = Planner()
        self._show_slots()
        self.form = form
        self.nonfinite = "anywhere"
        self.guarantee = ()
        self.match = match

    def _check_sizes(self) -> None:
        """Refuses branches whose outputs would differ in size: here, not at the first call."""
        geometries = [branch.geometry for branch in self.parts()]
        if len(geometries) > 1 and self.stride != (1, 1) and any(g.padding == "same" for g in geometries):
            raise ValueError("ShiftwiseConv2d: padding 'same' with a stride goes with a single branch only")
        if len({geometry.growth for geometry in geometries}) > 1:
            raise ValueError(
                f"ShiftwiseConv2d: branches {geometries} give outputs of different sizes; "
                "expected paddings that match their kernels"
            )

    @property
    def form(self) -> str:
        """The execution form asked for; :mod:`dispatch` decides on ``"auto"``, and :attr:`decision` says what ran."""
        return self._form

    @form.setter
    def form(self, value: str) -> None:
        check_form(value)
        self._form = value
        self.clear_cache()

    @property
    def nonfinite(self) -> str:
        """Where NaN and infinity at one pixel may go, ``"anywhere"`` or ``"local"``, as in :class:`SWConfig`."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        check_nonfinite(value)
        self._nonfinite = value
        self.clear_cache()

    @property
    def guarantee(self) -> tuple[str, ...]:
        """What the form that runs has to keep to, as in :class:`SWConfig`; a word or several may be assigned."""
        return self._guarantee

    @guarantee.setter
    def guarantee(self, value: str | Sequence[str] | None) -> None:
        self._guarantee: tuple[str, ...] = read_guarantee(value, "guarantee")
        self.clear_cache()

    @property
    def decision(self) -> Decision | None:
        """The form that ran last, and why; None before the first call, and not kept up to date by compiled code."""
        return self._planner.decision

    def forward(self, x: Tensor) -> Tensor:
        if not is_dynamo_compiling() and (shortcut := self._planner.shortcut) is not None:
            y = shortcut(x)
            if y is not None:
                return y
        if isinstance(x, torch.fx.Proxy):  # to every FX tracer this module is a leaf, as nn.Conv2d is
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})  # type: ignore[attr-defined]
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            _refuse_torchscript("torch.jit.trace")
        if x.dim() == 3 and self._takes_single_maps:
            return self.forward(x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"ShiftwiseConv2d: input of shape {tuple(x.shape)}, expected (B, {self.in_channels}, H, W), or "
                "(C, H, W) in a layer without BatchNorm"
            )
        return self._run(x)

    @property
    def _takes_single_maps(self) -> bool:
        """As nn.Conv2d does, and nn.BatchNorm2d does not: so neither does what takes the place of both."""
        return all(part.bn is None for part in self.parts())

    def _run(self, x: Tensor) -> Tensor:
        """The branches on a map ``(B, C, H, W)``."""
        planner = self._planner if self._frozen is None else self._frozen
        return planner(self, x)(x)

    def clear_cache(self) -> None:
        """Forgets the cached plan. Needed only after a write that PyTorch does not count (through ``tensor.data``)."""
        self._planner.forget()
        if self._frozen is not None:
            self._frozen.forget(self)

    @property
    def frozen(self) -> bool:
        """Whether compiled and captured calls take what the layer keeps as it is (:func:`sw_transplant.freeze`)."""
        return self._frozen is not None

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if value != self.frozen:
            self.clear_cache()
            self._frozen = Frozen() if value else None

    def rederive(self) -> None:
        """Makes again whatever follows from the placements: for who sets tensors without ``load_state_dict``.

        A loader that fills a module from the meta device leaves what is not in its files undefined.
        """
        for branch in self.parts():
            if isinstance(branch, Branch):
                branch.rederive()
        self.clear_cache()

    def reset_parameters(self) -> None:
        """Initialises the layer anew: every kernel and bias as nn.Conv2d does, every BatchNorm as it does itself."""
        for branch in self.parts():
            branch.reset_parameters()  # type: ignore[attr-defined]
            if branch.bn is not None:
                branch.bn.reset_parameters()  # type: ignore[operator]
        self.clear_cache()

    def train(self, mode: bool = True) -> ShiftwiseConv2d:
        if self._frozen is None:
            self.clear_cache()
        elif mode:
            raise RuntimeError(
                "ShiftwiseConv2d.train: the layer is frozen, for inference only; sw_transplant.unfreeze(model) first"
            )
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return without_buffers(self.__dict__)

    def _apply(self, *args: Any, **kwargs: Any) -> ShiftwiseConv2d:
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds every BatchNorm and joins the branches, in place: the call that timm's ``reparameterize_model`` makes.

        In eval the function stays the same; trained further, the module is a plain large-kernel convolution.
        """
        if self.reason_against_setting() is None:  # there is nothing to fold or to join
            if self.match is not None:
                self.__dict__[STRANGE] = True
            self.match = None
            return
        kernels, bias = self.kernels()
        trained, bias_trained = self.trained()
        grown = self.growth
        banks = [branch.bank for branch in self.parts() if not branch.is_identity]
        branches = []
        for i, kernel in enumerate(kernels):
            (kh, kw), (top, left), (dh, dw) = kernel.extent.kernel_size, kernel.extent.origin, kernel.extent.dilation
            sides = (top, grown[0] + dh * (kh - 1) - top, left, grown[1] + dw * (kw - 1) - left)
            # Padding that depends on the map goes with a single branch, so with a kernel of its extent.
            geometry = self._geometry if self.pads_by_map else BranchGeometry((kh, kw), sides, (dh, dw))
            tile = max(b.bank.shape[2] for b in self.parts())
            branch_bias, grads = bias if i == 0 else None, (trained[i], bias_trained)
            branch = Branch.from_kernel(geometry, kernel.weight, tile, bias=branch_bias, requires_grad=grads)
            take_attributes(branch.bank, banks)
            branches.append(branch)
        self.branches = nn.ModuleList(branches).train(self.training)
        if self.match is not None:
            self.__dict__[STRANGE] = True
        self.match = self.origin = None  # what it replaced can no longer be rebuilt from it
        self.clear_cache()

    def __prepare_scriptable__(self) -> None:
        """Asked for by ``torch.jit.script``, before it compiles anything."""
        _refuse_torchscript("torch.jit.script")

    def extra_repr(self) -> str:
        stride = "" if self.stride == (1, 1) else f", stride={self.stride}"
        frozen = ", frozen" if self.frozen else ""
        channels = f"{self.in_channels}, {self.out_channels}"
        return f"{channels}, kernel_size={self.kernel_size}{stride}, form={self.form!r}{frozen}"


def _refuse_torchscript(what: str) -> NoReturn:
    """A trace would keep the plan for the size of one map, and serve it to others."""
    raise RuntimeError(
        f"{what}: TorchScript cannot hold a ShiftwiseConv2d, whose plan follows the size of the map; got a converted "
        "model, expected a merged one. Merge first: sw_transplant.merge(model). torch.export and "
        "torch.onnx.export(..., dynamo=True) take converted models as they are"
    )
