"""Who else has got hold of a part of a model: attributes that are no submodules, functions, and what copies share.

``copy.deepcopy`` copies attributes, but a function stays the same function. One that was put on an instance and has
got hold of a layer, as in ``model.forward = lambda x: head(body(x))``, goes on calling the original's layers: to
convert a copy would change nothing, in silence. The same goes for attributes of classes, for weak references, and for
whatever says by itself how it is copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn

from sw_transplant.find.reach import holdings, reach


def held_beside(model: nn.Module) -> dict[Hashable, list[tuple[nn.Module, str]]]:
    """Modules and tensors that a model's modules hold, beside those that are registered there.

    Who is held in a list, or bound to a method or a function that is kept, is used without the model's knowing: a
    replacement in its place would not be.

    Returns:
        By :func:`identity`: the modules that hold it so, and where, such as ``"blocks.0.held"``. Hooks count as well.
    """
    found: dict[Hashable, list[tuple[nn.Module, str]]] = {}
    for holder, place, value in _held(model, set(model.modules())):
        if value is not holder:
            found.setdefault(identity(value), []).append((holder, place))
    return found


def stays_with_original(model: nn.Module, original: nn.Module) -> str | None:
    """What a copy has in common with the model that it is a copy of, as a reason not to convert the copy; or None.

    Args:
        model: the copy. It is neither run nor changed.
        original: what it was copied from.
    """
    modules = {module: f"layer {path!r}" if path else "the model" for path, module in original.named_modules()}
    names: dict[Hashable, str] = {identity(module): name for module, name in modules.items()}
    names |= {identity(parameter): f"parameter {path!r}" for path, parameter in original.named_parameters()}
    for path, module in model.named_modules():
        if module in modules:
            return _common(f"{path or 'the model'} says by itself how it is copied, and stays", modules[module])
    for _, place, value in _held(model, {*modules, *model.modules()}):
        if (name := names.get(identity(value))) is not None:
            return _common(f"{place} holds", name)
    return None


def identity(value: nn.Module | Tensor) -> Hashable:
    """Equal for one and the same module, and for tensors of the same memory, as ``weight`` and ``weight.data``."""
    if isinstance(value, nn.Module):
        return id(value)
    try:
        return value.untyped_storage()._cdata, value.storage_offset()
    except (RuntimeError, NotImplementedError):  # lazy, sparse, or of a class that has no storage
        return id(value)


def _held(model: nn.Module, known: set[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module | Tensor]]:
    """Who holds which module or tensor, and where; known modules are not looked into."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose code is none of Python's
            continue
        for name, value in holdings(module):
            for held in reach(value, lambda each: isinstance(each, nn.Module) and each in known):
                if isinstance(held, (nn.Module, Tensor)):
                    yield module, f"{path or 'model'}.{name}", held


def _common(what: str, name: str) -> str:
    return f"{what} {name} of the model that is copied: a copy would go on using it"
