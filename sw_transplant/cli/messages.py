"""What the commands say beside their result: notes, and one line for what the user gave wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sw_transplant.cli.load_model import InputError, one_line

EXTRAS = {"PIL": "hf", "matplotlib": "plot", "timm": "timm", "torchvision": "timm", "transformers": "hf"}
"""Which extra of sw-transplant brings a package."""


def note(text: str) -> None:
    """A line on stderr."""
    print(f"sw-transplant: note: {text}", file=sys.stderr)


@contextmanager
def input_errors() -> Iterator[None]:
    """What the library refuses becomes the one line that the user sees."""
    try:
        yield
    except ImportError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        hint = f'; pip install "sw-transplant[{extra}]"' if extra and "pip install" not in str(error) else ""
        raise InputError(f"{one_line(error)}{hint}") from error
    except InputError:
        raise
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError(one_line(error)) from error
