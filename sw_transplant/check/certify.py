"""A certificate in one call: what ``sw-transplant convert --certificate`` writes, from Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from sw_transplant.check.certificate import CERTIFICATE_NAME, Certificate
from sw_transplant.check.verify import verify
from sw_transplant.config import SWConfig
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d

IMAGES = 4
"""Images in a batch, where the data does not say."""


def certify(
    original: nn.Module,
    converted: nn.Module,
    path: str | os.PathLike[str],
    images: Any = None,
    *,
    config: SWConfig | None = None,
    **options: Any,
) -> Certificate:
    """Compares a model with its conversion, and writes what was found to ``certificate.json``.

    Args:
        original: the model as it was before :func:`convert`. After ``convert(model, inplace=True)`` that is
            ``restore(copy.deepcopy(model))``.
        converted: what :func:`convert` returned.
        path: the folder that :func:`save` wrote, whose files the certificate then covers, and where
            ``sw-transplant check`` looks for it; or a file.
        images: as ``data`` of :func:`verify`; None for noise.
        config: of the conversion, to stand in the certificate.
        options: further ones of :func:`verify`: ``batch_size`` (4), ``device``, ``dtype``, ``seed``, ...

    Returns:
        The certificate as it stands in the file. It is written also where the models differ: ``ok`` is then False.

    Raises:
        ValueError: the original is converted, too, the other model is not, or :func:`verify` refuses the data.

    Example:
        >>> import tempfile
        >>> import sw_transplant as sw
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 9, padding=4, groups=8))
        >>> converted = sw.convert(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sw.save(converted, folder)
        ...     certify(model, converted, folder, input_size=16).ok
        True
    """
    if _has_shiftwise(original):
        raise ValueError(
            "certify: the original has Shiftwise layers, expected the model as it was before convert; of a model that "
            "was converted in place that is sw_transplant.restore(copy.deepcopy(model))"
        )
    if not _has_shiftwise(converted):
        raise ValueError("certify: the converted model has no Shiftwise layer, expected what convert(model) returned")
    path = Path(path)
    file = path / CERTIFICATE_NAME if path.is_dir() else path
    verify(original, converted, images, **{"batch_size": IMAGES, **options}, certificate=file, config=config)
    return Certificate.read(file)


def _has_shiftwise(model: nn.Module) -> bool:
    return any(isinstance(module, ShiftwiseConv2d) for module in model.modules())
