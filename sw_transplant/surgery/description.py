"""What a converted model is made of, ready for JSON, and the layers built from that again: without tracing anything."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from sw_transplant.config import read_guarantee
from sw_transplant.find.candidate import build
from sw_transplant.find.keep import keep_attributes
from sw_transplant.find.match import Match, join_path
from sw_transplant.layers.masks import MaskedTiles
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.approximate import SharedSpec
from sw_transplant.surgery.origin import remember


class LayerDescription(NamedTuple):
    """What was replaced, how the layer runs, in mode shiftwise by what, and which parts have masks."""

    match: Match
    form: str
    shared: SharedSpec | None
    masks: tuple[str, ...] = ()
    nonfinite: str = "anywhere"
    guarantee: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The description, ready for JSON; of masks and guarantees only where there are some."""
        shared = None if self.shared is None else self.shared.to_dict()
        masks = {"masks": list(self.masks)} if self.masks else {}
        how = {"form": self.form, "nonfinite": self.nonfinite, "shared": shared}
        promised = {"guarantee": list(self.guarantee)} if self.guarantee else {}
        return {**how, **promised, **masks, **self.match.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerDescription:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: fields are missing, unknown or of the wrong kind.
        """
        try:
            rest = dict(values)
            form, shared, masks = rest.pop("form"), rest.pop("shared"), tuple(rest.pop("masks", ()))
            nonfinite = rest.pop("nonfinite", "anywhere")  # earlier folders do not say
            guarantee = read_guarantee(rest.pop("guarantee", ()), "layer")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"layer {values!r:.80}: not the description of a converted layer ({error!r})") from error
        if not all(isinstance(word, str) for word in (form, nonfinite, *masks)):
            raise ValueError(
                f"layer {values!r:.80}: form, nonfinite and masks: got {form!r:.80}, {nonfinite!r:.80}, "
                f"{masks!r:.80}; expected words"
            )
        return cls(
            Match.from_dict(rest),
            form,
            None if shared is None else SharedSpec.from_dict(shared),
            masks,
            nonfinite,
            guarantee,
        )


def describe(model: nn.Module) -> list[LayerDescription]:
    """Every Shiftwise layer of a model, at the places where it is now; none for a plain model.

    Raises:
        ValueError: a layer that cannot be rebuilt from the original architecture (reparameterized, or built by hand).
    """
    return [
        _describe(path, module, model) for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)
    ]


def rebuild(site: nn.Module, layer: LayerDescription, masked: Container[str] = ()) -> ShiftwiseConv2d:
    """The module of a layer, its weights those of the site or, in mode shiftwise, random.

    Args:
        site: what is replaced; it is not changed. Its BatchNorms become parts of the result.
        layer: what takes its place.
        masked: names of masks in the model's state_dict: the parts that get one, beside those that the layer names.

    Raises:
        ValueError: the site is not made as the layer says.
    """
    match = layer.match
    if layer.shared is not None:  # laid out only to check that the site is what was replaced
        match = replace(match, edges=1, branches=tuple(replace(branch, tile=1) for branch in match.branches))
    module = build(site, match, form=layer.form)
    if layer.shared is not None:
        like = next(site.parameters())
        module = layer.shared.build(layer.match, form=layer.form, device=like.device, dtype=like.dtype).train(
            site.training
        )
        keep_attributes(module, site, layer.match)
    module.nonfinite, module.guarantee = layer.nonfinite, layer.guarantee
    remember(module, site, layer.match)
    for name, part in module.named_modules():
        if isinstance(part, MaskedTiles) and (
            name in layer.masks or f"{join_path(layer.match.path, name)}.mask" in masked
        ):
            part.set_mask(torch.ones(part.tile_count, dtype=torch.bool))
    return module


def _describe(path: str, module: ShiftwiseConv2d, model: nn.Module) -> LayerDescription:
    if not isinstance(module.match, Match):
        raise ValueError(
            f"{path}: this Shiftwise layer cannot be rebuilt from the original architecture (it was reparameterized or "
            "built by hand); save a merged model's state_dict instead, see merge(model)"
        )
    places = tuple(place for place, other in model.named_modules(remove_duplicate=False) if other is module)
    match = replace(module.match, path=path, aliases=tuple(place for place in places if place != path))
    parts = module.named_modules()
    masks = tuple(name for name, part in parts if isinstance(part, MaskedTiles) and part.mask is not None)
    return LayerDescription(match, module.form, module.spec, masks, module.nonfinite, module.guarantee)


def read_descriptions(values: Sequence[Any]) -> list[LayerDescription]:
    """What :meth:`LayerDescription.to_dict` made of every layer, read again.

    Raises:
        ValueError: as :meth:`LayerDescription.from_dict`.
    """
    return [LayerDescription.from_dict(layer) for layer in values]
