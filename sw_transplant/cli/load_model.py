"""From a name on the command line to a model: a name of timm, a Hugging Face folder, or ``module:callable``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

HF_CONFIG = "config.json"
HF_PROCESSOR = "preprocessor_config.json"
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what else is known from where it came.

    Attributes:
        model: as built; in train or in eval mode.
        processor: folder of the Hugging Face image processor that belongs to it, or None.
        random: what of its weights is random, in words; None where nothing is, or where it is not known.
    """

    model: nn.Module
    processor: Path | None = None
    random: str | None = None


def load_model(
    source: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Builds a model by name. Nothing is downloaded, and no code that is stored beside weights is run.

    The first rule that applies decides:

    1. ``module:callable`` has a colon (and is no folder). The module is imported with the current directory on
       ``sys.path``; the callable, a dotted name in it, is called without arguments.
    2. A path (with a separator, or starting with ``.`` or ``~``) is a Hugging Face folder.
    3. Any other word is a timm name, those of :mod:`sw_transplant.models` included, or else a folder of that name.

    A Hugging Face folder holds ``config.json`` and, where the weights shall not be random, weights. It becomes an image
    classifier, unless its config names another architecture of transformers.

    Args:
        source: the name.
        checkpoint: file with the weights, for a timm name or a callable: see
            :func:`sw_transplant.models.load_checkpoint`.
        num_classes: outputs of the classifier, for a timm name.
        seed: of the weights that are not loaded.
        settings: further arguments of the network, for a timm name.

    Raises:
        InputError: there is no such model, it is a file, it cannot be built so, its weights cannot be read, or an
            optional package is not installed. What a user's own callable raises comes as it is.
    """
    _refuse_file(source)
    torch.manual_seed(seed)
    if ":" in source and not Path(source).is_dir():
        _refuse(num_classes, "--num-classes", source, "is called without arguments")
        _refuse(settings, "--settings", source, "is called without arguments")
        loaded = LoadedModel(_from_callable(source, seed))
    elif _is_path(source) or not _is_timm_name(source):
        _refuse(num_classes, "--num-classes", source, f"has its classes in {HF_CONFIG}")
        _refuse(settings, "--settings", source, f"has its settings in {HF_CONFIG}")
        _refuse(checkpoint, "--checkpoint", source, "is a folder that holds its own weights")
        loaded = _from_folder(Path(source).expanduser(), seed)
    else:
        folder = f" (the folder is ./{source})" if Path(source).is_dir() else ""
        random = f"{source} of timm{folder} without --checkpoint: random weights, seed {seed}"
        loaded = LoadedModel(_from_timm(source, num_classes, settings or {}), random=random)
    if checkpoint is None:
        return loaded
    try:
        _models().load_checkpoint(loaded.model, checkpoint)
    except (ValueError, OSError) as error:
        raise InputError(one_line(error)) from error
    return LoadedModel(loaded.model, loaded.processor)


KINDS = "MODEL is a name of timm, a Hugging Face folder (with config.json), or module:callable"
WEIGHTS = frozenset({".bin", ".ckpt", ".h5", ".msgpack", ".npz", ".pt", ".pth", ".pth.tar", ".safetensors", ".tar"})
GRAPHS = frozenset({".engine", ".mlmodel", ".onnx", ".pb", ".plan", ".tflite"})


def _refuse_file(source: str) -> None:
    """A file is no model: weights do not say which network they are of, and an exported graph is none of PyTorch's."""
    file = Path(source).expanduser()
    if not file.is_file():
        return
    if file.suffix.lower() in WEIGHTS:
        raise InputError(
            f"{source}: a file of weights, which does not say what network they are of; {KINDS}: name that network, "
            f"and give the file as --checkpoint {source}"
        )
    if file.suffix.lower() in GRAPHS:
        raise InputError(
            f"{source}: an exported graph, and no PyTorch model; {KINDS}: convert the model that it was exported from, "
            f"then export again"
        )
    if file.suffix == ".py":
        raise InputError(
            f"{source}: {KINDS}: name the function in it that builds the model, for instance {file.stem}:build"
        )
    raise InputError(f"{source}: a file; {KINDS}")


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; the name of its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _refuse(value: object, option: str, source: str, why: str) -> None:
    if value is not None:
        raise InputError(f"{option} does not go with {source}, which {why}; leave it out")


# ---- module:callable ----


def _from_callable(source: str, seed: int) -> nn.Module:
    module_name, _, path = source.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise InputError(
            f"{source}: not of the form module:callable, for instance my_package.my_module:build (models are not "
            "downloaded: give a timm name or a local folder)"
        )
    build = _find_callable(module_name, path, source)
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise InputError(
            f"{source} is called without arguments: {one_line(error)}; write a function around it"
        ) from error
    except ValueError:  # a builtin without a signature: the call will tell
        pass
    torch.manual_seed(seed)  # again: the import may have drawn numbers, and happens once in a process
    model = build()
    if not isinstance(model, nn.Module):
        raise InputError(f"{source}() returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _find_callable(module_name: str, path: str, source: str) -> Callable[[], Any]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: the callable may import as well
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{source}: {module_name} cannot be imported, from {os.getcwd()} or from the installed packages: "
            f"{one_line(error)}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise InputError(f"{source}: no {name!r} in {getattr(found, '__name__', type(found).__name__)}")
        found = getattr(found, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise InputError(f"{source} is a {type(found).__name__}, expected a function or class that returns a model")
    return found  # type: ignore[no-any-return]


# ---- timm ----


def _models() -> Any:
    try:
        return importlib.import_module("sw_transplant.models")
    except ImportError as error:
        raise InputError(one_line(error)) from error


def _is_timm_name(source: str) -> bool:
    """Whether timm knows the name; False for the name of a folder."""
    is_folder = Path(source).is_dir()
    try:
        _models()
    except InputError:
        if is_folder:
            return False
        raise
    import timm

    if timm.is_model(source):
        return True
    if is_folder:
        return False
    close = difflib.get_close_matches(source, timm.list_models(), n=3)
    meant = f", did you mean {' or '.join(close)}?" if close else ";"
    raise InputError(
        f"{source}: no such model in timm{meant} give a timm name, a Hugging Face folder or module:callable"
    )


def _from_timm(name: str, num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **settings)
    except RuntimeError as error:  # an unknown tag after the dot
        raise InputError(f"{name}: {one_line(error)}") from error
    except (TypeError, ValueError) as error:
        if not settings:
            raise
        raise InputError(f"{name} with --settings {dict(settings)}: {one_line(error)}") from error
    return model


# ---- Hugging Face ----


def _is_path(source: str) -> bool:
    separators = {"/", os.sep, os.altsep} - {None}
    return source.startswith((".", "~")) or any(separator in source for separator in separators if separator)


def _from_folder(folder: Path, seed: int) -> LoadedModel:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (models are not downloaded: give a local Hugging Face folder)")
    if not (folder / HF_CONFIG).is_file():
        converted = (folder / "sw_config.json").is_file()
        hint = f"name the original model, and add --converted {folder}" if converted else "is it a Hugging Face folder?"
        raise InputError(f"{folder}: no {HF_CONFIG} in it; {hint}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some architectures would fetch the weights of their backbone
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f'{folder}: Hugging Face folders need transformers: pip install "sw-transplant[hf]"'
        ) from error

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            architecture = _architecture(config, folder)
            if any((folder / name).is_file() for name in HF_WEIGHTS):
                if isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel):
                    del local["trust_remote_code"]  # an argument of Auto classes only
                model, info = architecture.from_pretrained(folder, output_loading_info=True, **local)
                missing = sorted(info["missing_keys"])
                random = f"{len(missing)} weights are not in {folder} and random: {_some(missing)}" if missing else None
            else:
                model = getattr(architecture, "from_config", architecture)(config)
                random = f"no weights in {folder}: random weights, seed {seed}"
    except InputError:
        raise
    except Exception as error:  # configs and weights from anywhere: they can be wrong in any way
        raise InputError(f"{folder}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    return LoadedModel(model, folder if (folder / HF_PROCESSOR).is_file() else None, random)


def _architecture(config: Any, folder: Path) -> Any:
    """The class to build: image classification, unless the config names another architecture."""
    import transformers

    names = list(config.architectures or [])
    classifier = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if classifier and (not names or any(name.endswith("ForImageClassification") for name in names)):
        return transformers.AutoModelForImageClassification
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    if not names and type(config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    raise InputError(
        f"{folder}: transformers {transformers.__version__} has no architecture for it: {HF_CONFIG} names "
        f"{_some(names) or 'none'}, model_type {config.model_type!r}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers: what matters of them is in the result."""
    from transformers.utils import logging as reports

    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if bars:
            reports.enable_progress_bar()
