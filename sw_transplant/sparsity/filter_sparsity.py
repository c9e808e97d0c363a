"""Coarse-grained dynamic sparsity: whole filters are taken out of use, and others taken into use, while a model trains.

SNIP decides how many filters each layer keeps; from then on, every so often, the filters with the smallest sum of
magnitudes are pruned and as many grown elsewhere in the same layer (ShiftwiseConv, appendix C; SLaK, appendix B).

    sparsity = FilterSparsity(model, sparsity=0.3)
    sparsity.initialise((images, labels, F.cross_entropy))
    sparsity.attach(optimizer)                # from here on optimizer.step() does the rest
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from sw_transplant.layers.masks import MaskedTiles
from sw_transplant.sparsity import exact, published
from sw_transplant.sparsity.masked_layers import MaskedLayer, of_first_rank, trainable_layers
from sw_transplant.sparsity.published import Dynamics, published_layers, published_rate
from sw_transplant.sparsity.snip import Batch, snip_scores

Init = Literal["snip", "snip_random"]
Growth = Literal["random", "gradient"]
_STEPS = "filter_sparsity_steps"
"""Entry of the optimizer's first parameter group: the count of steps travels with every checkpoint of the optimizer."""


class FilterSparsity:
    """Keeps a fixed share of each layer's filters in use, and moves it to where it serves best.

    The unit is one n x n filter of one channel in one path. The masks are buffers of the model: they are saved and
    loaded with it. Filters that are not in use contribute nothing, get no gradient and have zeros as weights; when they
    grow they start from these zeros, and with zeros in the optimizer's state. Everything is drawn from the seed and the
    count of steps; under ``torch.distributed`` all ranks have the masks of rank 0.

    Args:
        model: has converted layers (:class:`ShiftwiseConv2d`, in either mode). Frozen layers are left as they are.
        sparsity: the share of filters out of use, 0 to below 1 (the paper: 0.3; #27 of its Table 9: 0.2).
        only_L: large kernels only (the paper's "only L"). False: also, with a threshold of their own, the weights of
            ordinary convolutions and linear layers, each by itself as in SLaK, and the filters of small kernels.
        init: ``"snip"`` keeps the filters with the best scores; ``"snip_random"`` as many in each layer, but drawn at
            random, which is for training from scratch only (SLaK, section 3).
        growth: ``"random"``, or ``"gradient"`` for the filters with the largest sum of absolute gradients in that step.
        adaptation_rate: the share of the used filters that is exchanged in an update (SLaK: 0.3).
        total_steps: over how many steps the rate falls to 0 as half a cosine; None keeps it constant.
        update_frequency: steps of the optimizer from one update to the next (the paper's u: 100; SLaK-T: 2000); None:
            the masks stay as they are.
        sparse_gap: parallel paths get a common mask in every so many-th update, and are free in between.
        seed: of everything that is drawn; 0 or more.
        dynamics: ``"exact"``: each layer keeps its number of filters, and what was pruned does not come back at once.
            ``"published"``: what the official programs do, to compare a run with theirs; docs/sparsity.md has the
            differences. Works attached only.

    Raises:
        NoLargeKernelError: there is nothing to mask.
        NotImplementedError: parameters that are sharded over processes.
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.3,
        *,
        only_L: bool = True,
        init: Init = "snip",
        growth: Growth = "random",
        adaptation_rate: float = 0.3,
        total_steps: int | None = None,
        update_frequency: int | None = 100,
        sparse_gap: int = 131,
        seed: int = 0,
        dynamics: Dynamics = "exact",
    ) -> None:
        choices = (
            ("init", init, get_args(Init)),
            ("growth", growth, get_args(Growth)),
            ("dynamics", dynamics, get_args(Dynamics)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"FilterSparsity: {name} {value!r}, expected one of {allowed}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"FilterSparsity: sparsity {sparsity}, expected a share of at least 0 and below 1")
        if not 0 < adaptation_rate <= 1:
            raise ValueError(f"FilterSparsity: adaptation_rate {adaptation_rate}, expected a share above 0, at most 1")
        counts = {
            "update_frequency": 1 if update_frequency is None else update_frequency,
            "sparse_gap": sparse_gap,
            "total_steps": 1 if total_steps is None else total_steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"FilterSparsity: {name} {count}, expected at least 1")
        if seed < 0:
            raise ValueError(f"FilterSparsity: seed {seed}, expected 0 or more")
        self.model, self.sparsity, self.init, self.growth = model, sparsity, init, growth
        self.adaptation_rate, self.total_steps = adaptation_rate, total_steps
        self.update_frequency, self.sparse_gap, self.seed = update_frequency, sparse_gap, seed
        if dynamics == "published" and (init != "snip" or growth != "random"):
            raise ValueError(
                f"FilterSparsity: dynamics 'published' with init {init!r} and growth {growth!r}, "
                "expected 'snip', which draws there, and 'random'"
            )
        self.dynamics, self.steps = dynamics, 0
        layers_of = published_layers if dynamics == "published" else trainable_layers
        self._groups = layers_of(model, only_L=only_L)
        self._layers = [layer for group in self._groups for layer in group]
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []
        self._exploring = False
        self._gradients: dict[MaskedLayer, Tensor] = {}
        self._sparse = False
        self._equal_paths = True
        for layer in self._layers:
            layer.create_mask()
            if not layer.in_filters and dynamics == "exact":
                layer.weight.register_hook(lambda grad, layer=layer: self._masked_gradient(layer, grad))

    @classmethod
    def from_weights(cls, model: nn.Module, *, only_L: bool = True, **options: Any) -> FilterSparsity:
        """For weights that were trained sparse: what is zero is out of use; nothing is left to initialise.

        Published sparse networks hold zeros and no masks. Their parallel paths need not use equally many filters.

        Args:
            model: with its weights; filters that are all zero are taken out of use.
            only_L: filters of large kernels only; False: also single weights of other layers.
            options: further arguments of the constructor; ``update_frequency=None`` keeps the zeros where they are.

        Raises:
            ValueError: nothing is zero, or everything.
        """
        sparsity = cls(model, only_L=only_L, **options)
        idle = total = 0
        for layer in sparsity._layers:
            used = (layer.sums(layer.weight) != 0) & layer.possible
            layer.mask_in_use.copy_(used)
            total += int(layer.possible.sum())
            idle += int(layer.possible.sum()) - int(used.sum())
        if not 0 < idle < total:
            what = "filters of large kernels" if only_L else "filters and weights"
            raise ValueError(
                f"FilterSparsity.from_weights: {idle} of {total} {what} are zero, expected some and not all; load the "
                f"sparse weights first{', or try only_L=False' if only_L else ''}"
            )
        sparsity.sparsity, sparsity._equal_paths = idle / total, False
        return sparsity

    # ---- before training ----

    def initialise(self, batch: Batch) -> None:
        """Chooses the first masks by SNIP: ``|g * w|`` of one batch, averaged over each filter and parallel paths.

        One threshold for all large kernels (and one for the rest, if they are masked) leaves ``1 - sparsity`` of the
        filters; so layers end up with different shares. No layer is emptied. Parallel paths begin with a common mask.
        Filters that are not in use already have no weight, hence no score.

        Args:
            batch: :data:`Batch`. The model runs in the mode it is in; its BatchNorms' statistics are left as they were.
                Give the plain model, not one wrapped for distributed training.

        Raises:
            ValueError: no scalar loss that depends on the model, or gradients that are not finite.
        """
        scores = dict(zip(self._layers, snip_scores(self.model, self._layers, batch), strict=True))
        rng = np.random.default_rng((self.seed, 0))
        if self.dynamics == "published":
            self._set(published.first_masks(scores, 1 - self.sparsity, rng))
            published.forget_dense(self._optimizer)
            return
        self._set(exact.first_masks(scores, self._groups, 1 - self.sparsity, rng, drawn=self.init == "snip_random"))

    def rate(self, step: int) -> float:
        """The share of the used filters that an update after ``step`` steps exchanges."""
        if self.dynamics == "published":
            return published_rate(self.adaptation_rate, step, self.total_steps)
        if self.total_steps is None:
            return self.adaptation_rate
        return self.adaptation_rate * (1 + math.cos(math.pi * min(1.0, step / self.total_steps))) / 2

    # ---- in training ----

    def attach(self, optimizer: Any) -> FilterSparsity:
        """Does :meth:`step` after each ``optimizer.step()`` from here on, and resets the state of filters that grow.

        The count of steps is kept in the optimizer's first parameter group, so that a checkpoint of model and optimizer
        is all that a run needs to continue, whoever writes it. Gradients may be accumulated; steps that a gradient
        scaler skips do not count.

        Args:
            optimizer: a ``torch.optim.Optimizer`` that holds the masked weights; wrappers of Accelerate and timm's
                Lookahead are looked through. State of another shape than the weight (Adafactor's) is not reset.

        Raises:
            ValueError: attached already, no optimizer, or one that does not hold a masked weight.
        """
        while (inner := _inner(optimizer)) is not None:
            optimizer = inner
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"FilterSparsity.attach: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        if self._optimizer is not None:
            raise ValueError("FilterSparsity.attach: already attached to an optimizer; call detach() first")
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for layer in self._layers:
            if layer.weight not in held:
                raise ValueError(
                    f"{layer.path}: the optimizer does not hold its weight; expected all masked layers there. "
                    "Make the optimizer after convert(), or freeze the layer before FilterSparsity(...)"
                )
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_load_state_dict_post_hook(self._resume),
        ]
        self._resume(optimizer)
        self._set({layer: layer.mask_in_use.clone() for layer in self._layers})
        return self

    def detach(self) -> None:
        """Undoes :meth:`attach`. The masks stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer = [], None
        self._explore(False)

    def step(self) -> None:
        """Counts one step, and prunes and grows when it is time. Call it after the optimizer's step, if not attached.

        Raises:
            ValueError: attached (it would count twice), growth by gradient (which needs to see the gradients before
                the step), or no mask has been chosen yet.
        """
        if self._optimizer is not None:
            raise ValueError("FilterSparsity.step: attached, so optimizer.step() counts already; remove this call")
        if self.growth == "gradient" or self.dynamics == "published":
            what = "growth 'gradient'" if self.growth == "gradient" else "dynamics 'published'"
            raise ValueError(f"FilterSparsity.step: {what} works attached only; call attach(optimizer)")
        self._after_step()

    def state_dict(self) -> dict[str, int]:
        """What belongs to a checkpoint beside the model's state_dict, if no attached optimizer is saved."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ValueError: not what ``state_dict`` returned.
        """
        if not isinstance(state, dict) or not isinstance(state.get("steps"), int):
            raise ValueError(f"FilterSparsity.load_state_dict: got {state!r}, expected {{'steps': a number}}")
        self.steps = state["steps"]
        self._record()

    # ---- how ----

    def _due(self, step: int) -> bool:
        frequency = self.update_frequency
        return frequency is not None and step > 0 and step % frequency == 0 and self.rate(step) > 0

    @torch.no_grad()
    def _before_step(self) -> None:
        """Takes the gradients of filters that are not in use for the growth, and hides them from the optimizer."""
        if not self._exploring or self.dynamics == "published":
            return
        for layer in self._layers:
            grad = layer.weight.grad
            if grad is not None:
                self._gradients[layer] = layer.sums(grad)
                grad.masked_fill_(~layer.spread(layer.mask_in_use), 0)
        self._explore(False)

    def _after_step(self) -> None:
        if not self._sparse and self.sparsity:
            if all(bool(layer.mask_in_use.all()) for layer in self._layers):
                raise ValueError(
                    "FilterSparsity.step: every filter is in use, no mask has been chosen; "
                    "call initialise(...) before training, or load the state_dict of a sparse model"
                )
            self._sparse = True
        self.steps += 1
        if self.dynamics == "published":  # gradients of idle filters reach the optimizer: its steps are undone
            published.zero_idle(self._layers, self._optimizer)
        if self._due(self.steps):
            self._update()
        self._record()

    def _record(self) -> None:
        if self._optimizer is not None:
            self._optimizer.param_groups[0][_STEPS] = self.steps
            by_gradient = self.growth == "gradient" and self._due(self.steps + 1)
            self._explore(by_gradient or self.dynamics == "published")

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps = optimizer.param_groups[0].get(_STEPS, self.steps)
        self._record()

    def _explore(self, on: bool) -> None:
        """Lets filters that are not in use have gradients, or not."""
        self._exploring = on
        for layer in self._layers:
            if isinstance(layer.owner, MaskedTiles):
                layer.owner.explores = on

    def _masked_gradient(self, layer: MaskedLayer, grad: Tensor) -> Tensor:
        return grad if self._exploring else grad.masked_fill(~layer.mask_in_use, 0)

    @torch.no_grad()
    def _update(self) -> None:
        """Prunes and grows: together in all paths of a module every ``sparse_gap``-th time, else in each alone."""
        rng = np.random.default_rng((self.seed, self.steps))
        together = (self.steps // (self.update_frequency or 1)) % self.sparse_gap == 0
        parts = [part for group in self._groups for part in ([group] if together else [[each] for each in group])]
        if self.dynamics == "published":
            dense = published.left_dense(self._layers, self._optimizer)
            masked = [part for part in parts if part[0] not in dense]
            if masked:
                self._set(published.renewed_masks(masked, self.rate(self.steps), rng))
            return
        masks: dict[MaskedLayer, Tensor] = {}
        for part in parts:
            gradients = None if self.growth == "random" else self._gradients
            mask = exact.renewed_mask(part, self.rate(self.steps), rng, gradients, equal_paths=self._equal_paths)
            masks |= dict.fromkeys(part, mask)
        self._gradients.clear()
        self._set(masks)

    @torch.no_grad()
    def _set(self, masks: dict[MaskedLayer, Tensor]) -> None:
        """Puts the masks of rank 0 in place. What was not in use both before and after starts from zero."""
        if self.dynamics == "exact":
            exact.put_masks(of_first_rank(masks), self._optimizer)
            return
        for layer, mask in of_first_rank(masks).items():
            layer.mask_in_use.copy_(mask)
        published.zero_idle(self._layers, self._optimizer)


def _inner(optimizer: Any) -> Any:
    """The optimizer that a wrapper steps: Accelerate's, or timm's Lookahead; None where it is none."""
    return getattr(optimizer, "optimizer", None) or getattr(optimizer, "_base_optimizer", None)
