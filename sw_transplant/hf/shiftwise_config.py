"""What ``config.json`` says of the Shiftwise layers of a model, or what a plain model shall be converted to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from sw_transplant.config import CONFIG_VERSION, SWConfig
from sw_transplant.surgery.description import LayerDescription, read_descriptions
from sw_transplant.surgery.hosts import METHOD

Weights = Literal["dense", "banks"]


@register_quantization_config(METHOD)
class ShiftwiseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry ``quantization_config`` of a converted model; or how ``from_pretrained`` shall convert a plain one.

        AutoModel.from_pretrained("original", quantization_config=ShiftwiseConfig(SWConfig(tile=3)))

    Args:
        config: how to convert a plain model; None for ``SWConfig()``. Also as the dict of its fields.
        select: glob patterns of layer paths, as for :func:`sw_transplant.convert`; None for all.
        layers: of a model that is converted: what its layers are (:mod:`sw_transplant.surgery.description`), also as
            dicts. Then ``config`` and ``select`` mean nothing.
        weights: ``"dense"``: the file holds the original's kernels under their names, and any plain model can load it.
            ``"banks"``: it holds what the layers hold, which has no other form.
        version: of the format.

    Raises:
        ValueError: a value outside its range, a description that is damaged or was written by a newer version.
    """

    def __init__(
        self,
        config: SWConfig | dict[str, Any] | None = None,
        *,
        select: str | Sequence[str] | None = None,
        layers: Sequence[LayerDescription | dict[str, Any]] | None = None,
        weights: Weights = "dense",
        version: int = CONFIG_VERSION,
    ) -> None:
        self.quant_method: Any = METHOD  # transformers calls all that changes layers a quantization
        if not isinstance(version, int) or version > CONFIG_VERSION:
            raise ValueError(
                f"ShiftwiseConfig: version {version!r}, this sw_transplant reads up to {CONFIG_VERSION}; upgrade it"
            )
        if weights not in get_args(Weights):
            raise ValueError(f"ShiftwiseConfig: weights {weights!r}, expected one of {get_args(Weights)}")
        if callable(select):
            raise ValueError("ShiftwiseConfig: select is a function, expected glob patterns of layer paths")
        self.version = version
        self.config = config if isinstance(config, SWConfig) else SWConfig.from_dict(config or {})
        self.select = [select] if isinstance(select, str) else None if select is None else list(select)
        self.layers: list[LayerDescription] | None = None
        if layers is not None:
            given = [layer.to_dict() if isinstance(layer, LayerDescription) else layer for layer in layers]
            self.layers = read_descriptions(given)
        self.weights: Weights = weights

    def to_dict(self) -> dict[str, Any]:
        """The configuration, ready for JSON."""
        values: dict[str, Any] = {"quant_method": self.quant_method, "version": self.version}
        if self.layers is None:
            return {**values, "config": self.config.to_dict(), "select": copy.copy(self.select)}
        return {**values, "weights": self.weights, "layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown fields, or as the class.
        """
        values = {name: value for name, value in config_dict.items() if name != "quant_method"}
        try:
            config = cls(**values)
        except TypeError as error:
            raise ValueError(f"ShiftwiseConfig: {sorted(values)}: not written by this package ({error})") from error
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, name: str, default: Any = None) -> Any:
        """A field as in the dict that transformers expects in the configuration of a model, where it may find this."""
        return getattr(self, name, default)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShiftwiseConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]
