"""Saves a converted model, and rebuilds it on a model of the original architecture. Safetensors and JSON only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sw_transplant.config import CONFIG_VERSION
from sw_transplant.find.candidate import find_site
from sw_transplant.find.match import Match
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.zeros import masks_for, put_masks
from sw_transplant.surgery.convert import put
from sw_transplant.surgery.copies import operand
from sw_transplant.surgery.description import LayerDescription, describe, read_descriptions, rebuild
from sw_transplant.surgery.hosts import hosts_of
from sw_transplant.surgery.sizes import check_site, check_sizes

CONFIG_NAME = "sw_config.json"
WEIGHTS_NAME = "model.safetensors"
PARTIAL = ".partial"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes ``model.safetensors`` (the whole state_dict) and ``sw_config.json`` (path and geometry of each layer).

    A model of transformers is written by its own ``save_pretrained`` (:mod:`sw_transplant.hf`), and so that
    ``from_pretrained`` reads it.

    Args:
        model: a converted model.
        folder: made if it is absent; files of these two names in it are replaced.

    Raises:
        ValueError: the model has no Shiftwise layer, one that cannot be rebuilt from the original architecture
            (reparameterized, or built by hand), or state that is no tensor.
        OSError: the folder cannot be written: a full disk, no permission, a file of its name.

    Whatever stops it, an exception, a signal or the end of the process, the folder then holds what it held before, or
    the whole new model: :func:`load` sees where it stopped. (What a library writes by itself, such as
    ``save_pretrained``, is not of this kind.)
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    layers = [layer.to_dict() for layer in describe(model)]
    if not layers:
        raise ValueError(f"save: {type(model).__name__} has no Shiftwise layer, expected a model from convert(model)")
    target = Path(folder)
    for host in hosts_of(model):
        if host.saves(model):
            host.save(model, target)
            for name in (CONFIG_NAME, CONFIG_NAME + PARTIAL):  # of an earlier model in this folder
                (target / name).unlink(missing_ok=True)
            return
    tensors, shared = _distinct(model)
    description = {"version": CONFIG_VERSION, "layers": layers, "shared": shared}
    text = json.dumps(description, indent=1) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        _write_both(
            target, lambda path: save_file(tensors, path, metadata={"format": "pt"}), lambda path: path.write_text(text)
        )
    except (OSError, SafetensorError) as error:
        raise OSError(f"save: {target}: cannot be written ({error}); what was there is as it was") from error


def load(base_model: nn.Module, folder: str | os.PathLike[str], *, inplace: bool = False) -> nn.Module:
    """Rebuilds a saved model: exchanges the layers that ``sw_config.json`` names, then loads the weights, strictly.

    Nothing is searched or traced. A model on the meta device takes the tensors of the file as they are.

    Args:
        base_model: a model of the original architecture, not converted; its weights do not matter.
        folder: what :func:`save` wrote; for a model of transformers also what ``save_pretrained`` wrote.
        inplace: change ``base_model`` itself instead of a deep copy.

    Returns:
        The converted model with the saved weights, on the device of ``base_model``.

    Raises:
        ValueError: files that are absent, truncated or written by a newer version; a layer that ``base_model`` does not
            have; missing or unexpected weights, another shape or dtype. ``base_model`` is then left as it was.
    """
    if any(isinstance(module, ShiftwiseConv2d) for module in base_model.modules()):
        raise ValueError(
            f"load: {type(base_model).__name__} is converted already, expected a model of the original architecture; "
            "build one, or load the weights alone with load_state_dict"
        )
    layers, weights = _read(base_model, Path(folder))
    check_sizes(layers, weights, Path(folder))
    target = operand(base_model, inplace=inplace)
    built = [(layer.match, rebuild(find_site(target, layer.match.path), layer, weights)) for layer in layers]
    for match, _ in built:
        check_site(find_site(target, match.path), match)
    masks = _masks_of(target, built, weights)
    state = _state_after(target, built) | {name: weights[name] for name in masks}
    _check(state, weights, Path(folder))
    model = put(target, built)
    put_masks(masks, weights)
    model.load_state_dict(weights, strict=True, assign=any(tensor.is_meta for tensor in model.state_dict().values()))
    for host in hosts_of(model):
        host.follow(model)
    return model


def _read(base_model: nn.Module, folder: Path) -> tuple[list[LayerDescription], dict[str, Tensor]]:
    """The layers and the weights in a folder, by the library that the model comes from or by ``sw_config.json``."""
    for host in hosts_of(base_model):
        if host.saves(base_model) and (found := host.read(base_model, folder)) is not None:
            return read_descriptions(found[0]), found[1]
    layers, shared = _read_description(_description_of(folder / CONFIG_NAME))
    weights = _read_weights(folder / WEIGHTS_NAME)
    for alias, name in shared.items():
        if name in weights:
            weights[alias] = weights[name]
    return layers, weights


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict without repetitions, and which name stands for which: safetensors holds every tensor once."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save: entry {name!r} of the state_dict is {type(tensor).__name__}, expected a tensor")
        identity = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in first:
            shared[name] = first[identity]
        else:
            first[identity] = name
            tensors[name] = tensor.detach().contiguous().clone() if _is_view(tensor) else tensor.detach().contiguous()
    return tensors, shared


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _write_both(folder: Path, weights: Callable[[Path], Any], description: Callable[[Path], Any]) -> None:
    """Writes two files beside the old ones, then renames them.

    The description is written last and renamed last, so that it is there, partial, without the partial weights only
    between the two renames: :func:`_description_of` then knows that it belongs to the weights.
    """
    files = [folder / WEIGHTS_NAME, folder / CONFIG_NAME]
    partial = [file.with_name(file.name + PARTIAL) for file in files]
    _settle(*files)
    try:
        weights(partial[0])
        description(partial[1])
    except BaseException:
        for file in reversed(partial):
            file.unlink(missing_ok=True)
        raise
    for file, made in zip(files, partial, strict=True):
        made.replace(file)


def _settle(weights: Path, description: Path) -> None:
    """Ends what an earlier save began: takes over a description that belongs to the weights, removes the rest."""
    current = _description_of(description)
    if current != description:
        current.replace(description)
    for file in (description, weights):  # in this order, or the description would seem to belong to the weights
        file.with_name(file.name + PARTIAL).unlink(missing_ok=True)


def _description_of(description: Path) -> Path:
    """The file that describes the weights: the partial one where a save was stopped between its two renames."""
    partial = description.with_name(description.name + PARTIAL)
    stopped = partial.is_file() and not (description.parent / (WEIGHTS_NAME + PARTIAL)).is_file()
    return partial if stopped else description


def _read_description(path: Path) -> tuple[list[LayerDescription], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected the folder that save(model, folder) wrote")
    try:
        description = json.loads(path.read_text())
        version = description["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not written by save(model, folder) ({error})") from error
    if not isinstance(version, int) or version > CONFIG_VERSION:
        raise ValueError(
            f"{path}: version {version!r}, this sw_transplant reads up to {CONFIG_VERSION}; upgrade it to load this"
        )
    try:
        layers, shared = list(description["layers"]), dict(description["shared"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not written by save(model, folder) ({error!r})") from error
    return read_descriptions(layers), shared


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected the folder that save(model, folder) wrote")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); save the model again") from error


def _state_after(model: nn.Module, built: list[tuple[Match, ShiftwiseConv2d]]) -> dict[str, Tensor]:
    """The state_dict that the model will have once the built layers are in their places."""
    state = model.state_dict()
    for match, module in built:
        for place in (match.path, *match.aliases):
            prefix = f"{place}." if place else ""
            state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
            state |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
    return state


def _masks_of(
    model: nn.Module, built: list[tuple[Match, ShiftwiseConv2d]], weights: dict[str, Tensor]
) -> dict[str, nn.Module]:
    """What the file says of single weights that are out of use, in layers that were not converted and in branches."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for match, module in built:
        for place in (match.path, *match.aliases):
            modules |= dict(module.named_modules(prefix=place))
    return masks_for(modules, weights)


def _check(expected: dict[str, Tensor], got: dict[str, Tensor], path: Path) -> None:
    problems = []
    for what, names in (("missing", expected.keys() - got.keys()), ("unexpected", got.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            problems.append(f"{len(names)} {what} ({shown}{', ...' if len(names) > 3 else ''})")
    for name in sorted(expected.keys() & got.keys()):
        wanted, there = expected[name], got[name]
        if wanted.shape != there.shape or wanted.dtype != there.dtype:
            is_, should = f"{there.dtype} {tuple(there.shape)}", f"{wanted.dtype} {tuple(wanted.shape)}"
            problems.append(f"{name}: {is_} in the file, {should} in the model")
    if problems:
        raise ValueError(
            f"{path}: does not fit the model: {'; '.join(problems[:5])}; expected a base model of the same "
            "architecture, class count and dtype as the one that was saved"
        )
