"""ShiftwiseConv2d: a large depthwise convolution, or a sum of parallel ones, as banks of small tiles and placements."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from sw_transplant.forms import FORMS, Biases, Call, DenseKernel, add_kernels, dense_kernel, join_extents, join_kernels
from sw_transplant.forms.dispatch import Conditions, Decision, Job, check_form, choose_form, conditions
from sw_transplant.geometry import BranchGeometry, Extent, Padding, Size, enclose
from sw_transplant.layers.branch import Branch, PlacedTiles
from sw_transplant.layers.recompute import Recompute, computed_twice, normalise
from sw_transplant.layers.shortcut import Shortcut
from sw_transplant.layers.watch import Watch
from sw_transplant.ops.depthwise import is_channels_last, layout_of, runs_as_it_is


class ShiftwiseConv2d(nn.Module):
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

    Attributes:
        decision: the form that ran last, and why (:class:`dispatch.Decision`); None before the first call, and not
            kept up to date by compiled code.

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
    shortens = True
    """Whether all that a call does is in the plan, so that there can be a :class:`shortcut.Shortcut`."""
    padding_mode = "zeros"
    transposed = False
    output_padding = (0, 0)

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
        self._cache: _Cache | None = None
        self._shortcut: Shortcut | None = None
        self.form = form
        self.match = match
        self.decision: Decision | None = None

    def _check_sizes(self) -> None:
        """Refuses branches whose outputs would differ in size: here, not at the first call."""
        geometries = [branch.geometry for branch in self._branches()]
        if len(geometries) > 1 and self.stride != (1, 1) and any(g.padding == "same" for g in geometries):
            raise ValueError("ShiftwiseConv2d: padding 'same' with a stride goes with a single branch only")
        if len({geometry.growth for geometry in geometries}) > 1:
            raise ValueError(
                f"ShiftwiseConv2d: branches {geometries} give outputs of different sizes; "
                "expected paddings that match their kernels"
            )

    def _branches(self) -> Sequence[PlacedTiles]:
        return list(self.branches)  # type: ignore[arg-type]

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the module."""
        return self.branches[0].bank  # type: ignore[return-value]

    @property
    def _is_channels_last(self) -> bool:
        """Whether ``to(memory_format=torch.channels_last)`` was called on the module, or on what it replaces."""
        return is_channels_last(self._like)

    @property
    def _geometry(self) -> BranchGeometry:
        """That of the first branch: what it makes of a map's size, all branches make."""
        return self.branches[0].geometry  # type: ignore[return-value]

    # ---- what nn.Conv2d exposes ----

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
    def extent(self) -> Extent:
        """The one kernel that has every tap of every branch."""
        return reduce(enclose, [self._extent(branch, (1, 1)) for branch in self._branches()])

    def _extent(self, branch: PlacedTiles, size: Size) -> Extent:
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
    def padding(self) -> Size | Padding:
        """As in nn.Conv2d, ``(vertical, horizontal)`` or ``"same"``; four sides, top to right, where they differ."""
        if self._geometry.padding == "same" and self.stride != (1, 1):
            return "same"
        whole = self.extent
        grown = self.growth
        (top, left), (kh, kw), (dh, dw) = whole.origin, whole.kernel_size, whole.dilation
        bottom, right = grown[0] + dh * (kh - 1) - top, grown[1] + dw * (kw - 1) - left
        return (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)

    @property
    def growth(self) -> Size:
        """By how much the map grows at stride 1 (:attr:`geometry.BranchGeometry.growth`)."""
        return self._geometry.growth

    @property
    def weight(self) -> Tensor:
        """The one depthwise kernel ``(C_out, 1, kh, kw)`` that equals all branches, BatchNorm folded. Read-only."""
        return reduce(add_kernels, self._dense()).weight

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(C_out,)`` that goes with :attr:`weight`, BatchNorm folded; None for none. Read-only."""
        return _total([branch.folded_bias() for branch in self._branches()], self._like.dtype)

    def _dense(self) -> list[DenseKernel]:
        return [
            dense_kernel(placed)
            for branch in self._branches()
            for placed in branch.placed(self._extent(branch, (1, 1)).origin, fold=True)
        ]

    # ---- running ----

    def out_size(self, size: Size) -> Size:
        """Size of the output map for an input map ``(H, W)``."""
        return self._geometry.out_size(size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        if self._shortcut is not None and not torch.compiler.is_compiling():
            y = self._shortcut(x)
            if y is not None:
                return y
        if isinstance(x, torch.fx.Proxy):  # to every FX tracer this module is a leaf, as nn.Conv2d is
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})  # type: ignore[attr-defined]
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"ShiftwiseConv2d: input of shape {tuple(x.shape)}, expected (B, {self.in_channels}, H, W) or (C, H, W)"
            )
        given = x.contiguous(memory_format=torch.channels_last) if self._is_channels_last else x
        y = self._run(given).contiguous(memory_format=layout_of(given))
        self._shorten(x, given)
        return y

    def _shorten(self, x: Tensor, given: Tensor) -> None:
        """Makes a shortcut for maps like x, which the long way took as ``given``, once that has been repeated."""
        cached = self._cache
        if self.shortens and cached is not None and cached.repeated and runs_as_it_is(x):
            plan, call = cached.ready.plan, cached.ready.call
            if Shortcut.applies(plan, call, x):
                self._shortcut = Shortcut(x, given, plan[0], cached.ready.biases[0], cached.watch)

    def _run(self, x: Tensor) -> Tensor:
        """The branches on a map ``(B, C, H, W)``."""
        ready = self._ready(x)
        if ready.autocast and x.dtype is not ready.call.dtype:
            x = x.to(ready.call.dtype)
        maps = FORMS[ready.decision.form].execute(x, ready.plan, ready.biases, ready.call)
        first = len(maps) - len(ready.norms)
        for k in range(first, len(maps)):
            maps[k] = self._normalise(ready, k, maps[k], x)
        return reduce(add, maps)

    def _normalise(self, ready: _Ready, k: int, responses: Tensor, x: Tensor) -> Tensor:
        """Output k through its BatchNorm."""
        norm = ready.norms[k - len(ready.biases)]
        if not ready.twice[k] or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return norm(responses)  # type: ignore[no-any-return]
        one, given = slice(k, k + 1), x.detach()
        execute = FORMS[ready.decision.form].execute
        return normalise(
            norm, responses, lambda: execute(given, ready.plan[one], ready.biases[one], ready.call)[0].to(responses)
        )

    def _ready(self, x: Tensor) -> _Ready:
        """What runs on this map, from the cache where nothing has changed."""
        if torch.compiler.is_compiling():
            return self._prepare(x, conditions(x))
        given = conditions(x)
        if given.transformed:  # tensors that stand for others must not stay behind in a plan
            self.clear_cache()
            return self._prepare(x, given)
        stream = None
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                # The graph runs later, and may outlive the plan: it makes its own, from the weights of that time.
                return self._prepare(x, given)
            stream = torch.cuda.current_stream(x.device).cuda_stream  # on another one it may not be ready yet
        key = (self._form, given, x.shape[1:], torch.is_inference_mode_enabled(), stream)
        cached = self._cache
        if cached is not None and cached.key == key and cached.watch.unchanged():
            cached.repeated = True
            return cached.ready
        self.clear_cache()
        ready = self._prepare(x, given)
        self.decision = ready.decision
        if not ready.norms:
            with suppress(RuntimeError):  # tensors whose changes nobody counts are not cached
                watch = Watch(self)
                if not (torch.is_grad_enabled() and watch.wants_gradients()):
                    self._cache = _Cache(key, ready, watch)
        return ready

    def _prepare(self, x: Tensor, given: Conditions) -> _Ready:
        """The sum of all linear branches, then each branch that batch statistics normalise, in the form that is best.

        Raises:
            ValueError: the map is too small for the kernels.
        """
        size = (x.shape[2], x.shape[3])
        out_size = self.out_size(size)
        if min(out_size) < 1:
            raise ValueError(
                f"ShiftwiseConv2d: map {x.shape[2]}x{x.shape[3]} with padding {self.padding} is smaller than the "
                f"kernel {self.kernel_size}; expected a map that gives at least one output"
            )
        dtype = self._like.dtype
        autocast = given.autocast is not None and dtype is not torch.float64  # which autocast leaves alone
        call = Call(size, out_size, self.stride, given.autocast if autocast else dtype)  # type: ignore[arg-type]
        branches = sorted(self._branches(), key=lambda branch: not branch.folds)
        extents = [self._extent(branch, size) for branch in branches]
        linear = [branch for branch in branches if branch.folds]  # these come first
        normalised = branches[len(linear) :]
        parts = [
            branch.placed(extent.origin, fold=branch.folds) for branch, extent in zip(branches, extents, strict=True)
        ]
        if self.in_channels != self.out_channels:  # each channel goes to several: not the map as it is
            parts = [[replace(placed, identity=False) for placed in part] for part in parts]
        outputs = [reduce(add, parts[: len(linear)])] if linear else []
        outputs += parts[len(linear) :]
        biases: list[Tensor | None] = [branch.bias for branch in normalised]
        if linear:
            biases.insert(0, _total([branch.folded_bias() for branch in linear], self._like.dtype))

        kernels = [[extent for extent, _ in join_extents([placed.extent for placed in entry])] for entry in outputs]
        trained = torch.is_grad_enabled() and any(placed.bank.requires_grad for entry in outputs for placed in entry)
        job = Job((x.shape[1], outputs[0][0].bank.shape[0]), call, kernels, trained)
        decision = choose_form(self.form, job, given)
        return _Ready(
            decision,
            FORMS[decision.form].prepare(outputs, call),
            [None if bias is None else bias.to(call.dtype) for bias in biases],
            [branch.bn for branch in normalised],  # type: ignore[misc]
            call,
            autocast,
            computed_twice(
                "none" if decision.form == "shift" else self.recompute, [sum(e.taps for e in ks) for ks in kernels]
            ),
        )

    def clear_cache(self) -> None:
        """Forgets the cached plan. Needed only after a write that PyTorch does not count (through ``tensor.data``)."""
        self._cache = None
        self._shortcut = None

    def rederive(self) -> None:
        """Makes again whatever follows from the placements: for who sets tensors without ``load_state_dict``.

        A loader that fills a module from the meta device leaves what is not in its files undefined.
        """
        for branch in self._branches():
            if isinstance(branch, Branch):
                branch.rederive()
        self.clear_cache()

    def train(self, mode: bool = True) -> ShiftwiseConv2d:
        self.clear_cache()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> ShiftwiseConv2d:
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_shortcut": None, "decision": None}

    # ---- back to plain convolutions ----

    @property
    def channel_order(self) -> Tensor | None:
        """Which input channel the k-th channel of :meth:`kernels` reads, ``(C_in,)``; None for the k-th itself."""
        return None

    def kernels(self) -> tuple[list[DenseKernel], Tensor | None]:
        """The plain convolutions that this module equals in eval: as few kernels as add no work, and one bias.

        Raises:
            NotImplementedError: a BatchNorm keeps no running statistics, so that there is nothing to fold.
        """
        for i, branch in enumerate(self._branches()):
            if branch.bn is not None and getattr(branch.bn, "running_mean", None) is None:
                raise NotImplementedError(
                    f"ShiftwiseConv2d: the BatchNorm of branch {i} has no running statistics to fold; "
                    "expected track_running_stats=True"
                )
        return join_kernels(self._dense()), self.bias

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Folds every BatchNorm and joins the branches, in place: the call that timm's ``reparameterize_model`` makes.

        In eval the function stays the same; trained further, the module is a plain large-kernel convolution.
        """
        kernels, bias = self.kernels()
        grad = any(parameter.requires_grad for parameter in self.parameters())
        grown = self.growth
        dynamic = self.padding == "same"
        branches = []
        for i, kernel in enumerate(kernels):
            (kh, kw), (top, left), (dh, dw) = kernel.extent.kernel_size, kernel.extent.origin, kernel.extent.dilation
            sides = (top, grown[0] + dh * (kh - 1) - top, left, grown[1] + dw * (kw - 1) - left)
            geometry = BranchGeometry((kh, kw), "same" if dynamic else sides, (dh, dw))
            tile = max(b.bank.shape[2] for b in self._branches())
            branch_bias = bias if i == 0 else None
            grads = (grad, grad)
            branches.append(Branch.from_kernel(geometry, kernel.weight, tile, bias=branch_bias, requires_grad=grads))
        self.branches = nn.ModuleList(branches).train(self.training)
        self.match = self.origin = None  # what it replaced can no longer be rebuilt from it
        self.clear_cache()

    def extra_repr(self) -> str:
        stride = "" if self.stride == (1, 1) else f", stride={self.stride}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{stride}, form={self.form!r}"


class _Ready(NamedTuple):
    """What runs: the form, its plan, what is added to each output, and the BatchNorms of the last outputs.

    ``autocast``: maps of another dtype are cast. ``twice``: which outputs are computed again in the backward pass.
    """

    decision: Decision
    plan: Any
    biases: Biases
    norms: list[nn.Module]
    call: Call
    autocast: bool
    twice: list[bool]


@dataclass
class _Cache:
    """What ran on maps and under conditions of this key, while the module stays as it is.

    ``repeated``: it ran more than once.
    """

    key: tuple[Any, ...]
    ready: _Ready
    watch: Watch
    repeated: bool = False


def _total(biases: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Sum of the biases that exist, rounded once to the dtype of the bank."""
    given = [bias for bias in biases if bias is not None]
    return reduce(add, given).to(dtype) if given else None
