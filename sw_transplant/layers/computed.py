"""What ``layer.weight`` gives: a tensor computed from the layer's tiles, which nobody can write to unnoticed.

A converted layer holds a bank of tiles, and no kernel. What reads its ``weight`` gets a kernel that is put together for
the occasion, and a write into that would be gone with it: ``nn.init.zeros_(layer.weight)`` would do nothing, without a
word. Hence :class:`ComputedTensor`: it computes as any tensor does, and results are plain tensors, but whatever would
write into it, or into a view of it, raises and says what to call instead. What belongs to a parameter and not to its
values goes through to the bank: ``requires_grad``, ``grad``, hooks, attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sw_transplant.layers.layout import Layout
from sw_transplant.layers.parameters import KernelHooks


@dataclass(frozen=True)
class Source:
    """Where a computed tensor comes from.

    Attributes:
        name: what it is called: ``"ShiftwiseConv2d.weight"``.
        remedy: what to call to change it.
        bank: the parameter that holds the same numbers, one to one, with how they lie in it; None where there is none.
    """

    name: str
    remedy: str
    bank: tuple[Tensor, Layout] | None = None


def computed(tensor: Tensor, source: Source) -> Tensor:
    """The tensor, guarded against writes; one of another class stays as it is."""
    if type(tensor) is not Tensor:
        return tensor
    guarded = tensor.as_subclass(ComputedTensor)
    guarded._source, guarded._whole = source, True
    guarded.__dict__["_is_param"] = True  # what isinstance(tensor, nn.Parameter) asks for
    return guarded


class ComputedTensor(Tensor):
    """A tensor computed from the parameters of a layer; what writes into it raises RuntimeError, and names the remedy.

    Copies (``clone``, ``copy.deepcopy``, pickles, results of any operation) are plain tensors; views and ``detach()``
    are guarded alike. To ``isinstance`` it is an ``nn.Parameter``, as the weight of an ``nn.Conv2d`` is. Later changes
    of the layer do not reach it: read the attribute again.
    """

    _source: Source
    _whole: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(
            kind not in (cls, Tensor, nn.Parameter) for kind in types
        ):  # let the other class do it, with plain tensors
            args, kwargs = tree_map(_plain, (args, kwargs))
            return func(*args, **kwargs)
        name = _name_of(func)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if name in _SPECIAL and args and isinstance(first, cls):
            return _SPECIAL[name](*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        for tensor in given:
            if _writes(name) and any(tensor is leaf for leaf in tree_leaves(first)):
                raise tensor._refusal(name)
            if any(tensor is leaf for leaf in tree_leaves(kwargs.get("out"))):
                raise tensor._refusal(f"{name}(out=...)")
            if kwargs.get("inplace") is True:
                raise tensor._refusal(f"{name}(inplace=True)")
        with torch._C.DisableTorchFunctionSubclass():
            versions = [_version(tensor) for tensor in given]
            result = func(*args, **kwargs)
            for tensor, version in zip(given, versions, strict=True):
                if _version(tensor) != version:
                    raise tensor._refusal(name)
            return _guard_views(result, given)

    def set_(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """Refused here, as PyTorch does not ask ``__torch_function__`` about it. Parametrizations begin with it."""
        raise RuntimeError(
            f"{self._source.name}: it is computed for who reads it, and can be neither set_ nor parametrized; "
            f"parametrize what it is computed from, (layer.branches[0], 'bank'), or {self._source.remedy}"
        )

    def _refusal(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self._source.name}: {what} would change a tensor that is computed for who reads it, and not the layer; "
            f"{self._source.remedy}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param" and not self._whole:  # nn.Parameter(layer.weight): a parameter in its own right
            self.__dict__.clear()
            self.__class__ = nn.Parameter  # type: ignore[assignment]
        elif name in ComputedTensor.__annotations__ or hasattr(ComputedTensor, name):
            super().__setattr__(name, value)
        elif (bank := _bank(self)) is not None:
            setattr(bank[0], name, value)
        else:
            self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        bank = _bank(self) if "_whole" in self.__dict__ else None
        if bank is None or name not in vars(bank[0]):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return vars(bank[0])[name]


# ---- what a function does with a tensor ----

_IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"),
        *("ipow", "imatmul", "iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


def _name_of(func: Any) -> str:
    """``"add_"``; of what an attribute does, ``"data.__set__"``."""
    name = getattr(func, "__name__", str(func))
    return f"{func.__self__.__name__}.{name}" if name in ("__get__", "__set__", "__delete__") else name


def _writes(name: str) -> bool:
    return name in _IN_PLACE or name.endswith(("__set__", "__delete__")) or (name[-1] == "_" and name[-2:] != "__")


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, ComputedTensor):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        return leaf.as_subclass(Tensor)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _guard_views(result: Any, given: list[ComputedTensor]) -> Any:
    """The result, with what shares memory with a guarded tensor guarded, too."""
    if not isinstance(result, (Tensor, tuple, list)):
        return result
    memory = {tensor.untyped_storage()._cdata: tensor._source for tensor in given}

    def guard(leaf: Any) -> Any:
        if type(leaf) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            return leaf
        source = memory.get(leaf.untyped_storage()._cdata)
        return leaf if source is None else _part(leaf, source)

    return tree_map(guard, result)


def _part(tensor: Tensor, source: Source) -> ComputedTensor:
    part = tensor.as_subclass(ComputedTensor)
    part._source, part._whole = source, False
    return part


# ---- what belongs to the parameter ----


def _as_usual(func: Any, tensor: ComputedTensor, *args: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(tensor, *args)


def _bank(tensor: ComputedTensor) -> tuple[Tensor, Layout] | None:
    return tensor._source.bank if tensor._whole else None


def _requires_grad(tensor: ComputedTensor) -> Any:
    if (bank := _bank(tensor)) is not None:  # also under no_grad, where nothing that is computed does
        return bank[0].requires_grad
    return _as_usual(Tensor.requires_grad.__get__, tensor)  # type: ignore[attr-defined]


def _set_requires_grad(tensor: ComputedTensor, requires_grad: bool = True) -> ComputedTensor:
    if (bank := _bank(tensor)) is not None:
        bank[0].requires_grad_(requires_grad)
    elif not tensor._whole:
        _as_usual(Tensor.requires_grad_, tensor, requires_grad)
    elif requires_grad != tensor.requires_grad:
        raise _refusal_of_parts(tensor, "requires_grad", "layer.requires_grad_(...) sets it for all of them")
    return tensor


def _is_leaf(tensor: ComputedTensor) -> Any:
    """As no parameter of a model: an optimizer must not take it."""
    return not tensor.requires_grad if tensor._whole else _as_usual(Tensor.is_leaf.__get__, tensor)  # type: ignore[attr-defined]


def _grad(tensor: ComputedTensor) -> Tensor | None:
    if not tensor._whole:
        return _as_usual(Tensor.grad.__get__, tensor)  # type: ignore[union-attr, no-any-return]
    bank = _bank(tensor)
    if bank is None or bank[0].grad is None:
        return None
    return _part(bank[1].to_dense(bank[0].grad), tensor._source)


def _set_grad(tensor: ComputedTensor, grad: Tensor | None) -> None:
    if (bank := _bank(tensor)) is not None:
        bank[0].grad = None if grad is None else bank[1].to_bank(grad.detach())
    elif not tensor._whole:
        _as_usual(Tensor.grad.__set__, tensor, grad)  # type: ignore[union-attr]
    elif grad is not None:
        raise _refusal_of_parts(tensor, "grad", "each has its own in layer.parameters()")


def _register_hook(tensor: ComputedTensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
    if (bank := _bank(tensor)) is not None:
        return bank[0].register_hook(KernelHooks({0: hook}, bank[1]))
    if not tensor._whole:
        return _as_usual(Tensor.register_hook, tensor, hook)
    raise _refusal_of_parts(tensor, "a hook", "register it on one of layer.parameters()")


def _refuse_post_hook(tensor: ComputedTensor, hook: Any) -> Any:
    raise RuntimeError(
        f"{tensor._source.name}: a hook that runs after gradients are accumulated would never run: gradients are those "
        "of the layer's banks; register it on layer.parameters()"
    )


def _refusal_of_parts(tensor: ComputedTensor, what: str, remedy: str) -> RuntimeError:
    return RuntimeError(f"{tensor._source.name}: {what} belongs to the parameters that it is computed from; {remedy}")


def _read_only(func: Any) -> Callable[..., Any]:
    def array(tensor: ComputedTensor, *args: Any, **kwargs: Any) -> Any:
        result = func(_plain(tensor), *args, **kwargs)
        result.flags.writeable = False
        return result

    return array


def _copied(tensor: ComputedTensor) -> Tensor:
    """What copies and pickles hold: a tensor without a past, a parameter where it looked like one."""
    values = _plain(tensor).detach().clone()
    return values if _bank(tensor) is None else nn.Parameter(values, tensor.requires_grad)


def _deep_copy(tensor: ComputedTensor, memo: dict[int, Any]) -> Tensor:
    memo[id(tensor)] = copied = _copied(tensor)
    return copied


_SPECIAL: dict[str, Callable[..., Any]] = {
    "requires_grad.__get__": _requires_grad,
    "requires_grad.__set__": _set_requires_grad,
    "requires_grad_": _set_requires_grad,
    "is_leaf.__get__": _is_leaf,
    "grad.__get__": _grad,
    "grad.__set__": _set_grad,
    "retain_grad": lambda tensor: None if tensor._whole else _as_usual(Tensor.retain_grad, tensor),
    "register_hook": _register_hook,
    "register_post_accumulate_grad_hook": _refuse_post_hook,
    "numpy": _read_only(Tensor.numpy),
    "__array__": _read_only(Tensor.__array__),
    "__deepcopy__": _deep_copy,
    "__reduce_ex__": lambda tensor, protocol: _copied(tensor).__reduce_ex__(protocol),
}
