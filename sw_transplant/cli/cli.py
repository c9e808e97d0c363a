"""The command line: inspect, convert, verify, check, report, cache, and ladder, cost, erf, recipe about the papers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

import torch

from sw_transplant import __version__
from sw_transplant.cli.certificates import run_check
from sw_transplant.cli.command import add_command
from sw_transplant.cli.commands import run_cache, run_convert, run_inspect, run_verify
from sw_transplant.cli.load_model import InputError, one_line
from sw_transplant.cli.pages import FIELD_IMAGES, run_report
from sw_transplant.cli.results import Result
from sw_transplant.cli.science import add_science_commands
from sw_transplant.config import Form, Guarantee, SWConfig
from sw_transplant.interrupts import Stopped, stopped_by_signals
from sw_transplant.surgery.io import CONFIG_NAME, WEIGHTS_NAME

BAD_INPUT, BUG, INTERRUPTED, BROKEN_PIPE = 2, 3, 130, 141
"""Exit codes beside the command's own. BUG is an exception that nobody expected, also one of the model's own code."""

DTYPES = ("float64", "float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after the program's name; None for those of this process.

    Returns:
        The exit code: 0 fine, 1 beyond verify's bound or not as certified, 2 bad input, 3 an unexpected exception (its
        traceback is on stderr), 130 interrupted, 141 nobody reads the output, 143 terminated. Signals are taken over
        until it returns, in the main thread, even ignored ones.

    Raises:
        SystemExit: code 0, after ``--help`` and ``--version``.
    """
    try:
        with stopped_by_signals():
            return _run(argv)
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:  # raised by code of the model, or in another thread
        return INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace(traceback=False)
    try:
        _parser().parse_args(argv, arguments)
        with redirect_stdout(sys.stderr):  # what a model's own code prints is no result
            result = arguments.command(arguments)
        _write(result.text, sys.stderr if arguments.json else sys.stdout)
        if arguments.json:
            _write(json.dumps(result.values, indent=2, allow_nan=False), sys.stdout)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more when it ends
        return BROKEN_PIPE
    except (InputError, torch.OutOfMemoryError) as error:
        if arguments.traceback:
            traceback.print_exc()
        print(f"sw-transplant: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except Exception:
        traceback.print_exc()
        return BUG
    return result.code


def _write(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)  # a console may lack the lines


# ---- arguments ----


class _Parser(argparse.ArgumentParser):
    """Leaves the report of a wrong argument to `main`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


MODEL_HELP = """\
MODEL is one of
  convnext_atto, slak_tiny     a name of timm; SLaK, RepLKNet and UniRepLKNet included
  path/to/folder, ./folder     a Hugging Face folder: config.json, weights
  my_package.my_module:build   a function without arguments that returns a model
Nothing is downloaded. Weights that are not given are random (--seed).
"""

EXIT_HELP = """\
exit codes: 0 fine, 1 verify, check: beyond the bound or changed, 2 bad input, 3 a bug (or the model's own code failed)
"""

EXAMPLES = {
    "inspect": """\
  sw-transplant inspect convnext_atto
  sw-transplant inspect ./my_convnext --min-kernel 5
  sw-transplant inspect slak_tiny --select 'stages.2.*' --json
""",
    "convert": """\
  sw-transplant convert slak_tiny --checkpoint slak_tiny.pth --output converted
  sw-transplant convert ./my_convnext -o converted --tile 3 --form shift
  sw-transplant convert my_module:build -o converted --select 'stages.2.*' --select 'stages.3.*'
""",
    "verify": """\
  sw-transplant verify slak_tiny --checkpoint slak_tiny.pth
  sw-transplant verify slak_tiny --checkpoint slak_tiny.pth --converted converted --data imagenet/val
  sw-transplant verify ./my_convnext --data images.npz --device cuda --dtype float16 --json
  sw-transplant verify my_module:super_resolution --data photos --no-resize
""",
    "report": """\
  sw-transplant report convnext_atto --size 64 --out report.html
  sw-transplant report slak_tiny --checkpoint slak_tiny.pth --data imagenet/val --max-images 500
""",
    "check": """\
  sw-transplant check converted
  sw-transplant check converted --model slak_tiny --checkpoint slak_tiny.pth
""",
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sw-transplant",
        description="Rewrites the large depthwise convolutions of a vision model as small shifted ones, exactly.",
        epilog=f"examples:\n{''.join(EXAMPLES.values())}\n{EXIT_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sw-transplant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_convert(commands)
    _add_verify(commands)
    _add_check(commands)
    _add_report(commands)
    _add_cache(commands)
    add_science_commands(commands, MODEL_HELP)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _add_model_command(commands, "inspect", run_inspect, "show what would be converted, and what not and why")
    _add_search(parser)


def _add_convert(commands: Any) -> None:
    parser = _add_model_command(commands, "convert", run_convert, "convert a model and save it")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help=f"gets {WEIGHTS_NAME} and {CONFIG_NAME}; default: not saved"
    )
    parser.add_argument(
        "--certificate", action="store_true", help="compare with the original, and write certificate.json beside it"
    )
    _add_search(parser)
    _add_form(parser)


def _add_verify(commands: Any) -> None:
    parser = _add_model_command(commands, "verify", run_verify, "compare a model with its conversion, number by number")
    parser.add_argument(
        "--converted", type=Path, metavar="FOLDER", help="what convert saved; default: the model is converted now"
    )
    _add_data(parser)
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="write what was found to this JSON file")
    parser.add_argument(
        "--bound", type=_bound, metavar="X", help="relative RMS error allowed; default: by dtype, float32 1e-5"
    )
    _add_search(parser)
    _add_form(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="folder of class folders (ImageNet's val), folder of images, or .npz with images and, if wanted, labels; "
        "default: noise",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the class folders in the order of the model's outputs, one on each line or a JSON list",
    )
    parser.add_argument("--no-labels", action="store_true", help="compare all images below --data without labels")
    parser.add_argument("--no-resize", action="store_true", help="leave the images of --data their size")
    parser.add_argument("--max-images", type=_count, metavar="N", help="of --data, evenly spread; default: all")
    parser.add_argument("--batch-size", type=_count, default=16, metavar="N", help="images at once (%(default)s)")
    parser.add_argument(
        "--size",
        "--input-size",
        dest="input_size",
        type=_size,
        metavar="SIZE",
        help="of the images, 224 or 192x256; default: the model's",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: where the model is built")
    parser.add_argument("--dtype", choices=DTYPES, help="what to compute in; default: the model's")


def _add_report(commands: Any) -> None:
    parser = _add_model_command(
        commands, "report", run_report, "write a page with tables, pictures and the certificate"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="%(default)s")
    parser.add_argument(
        "--receptive-field",
        type=_count,
        nargs="?",
        const=FIELD_IMAGES,
        metavar="N",
        help="show the effective receptive fields, too, on N images (%(const)s); without --data, on noise",
    )
    parser.add_argument(
        "--map", metavar="PATH", help="the module whose output --receptive-field looks at; default: the last stage"
    )
    _add_data(parser)
    _add_search(parser)
    _add_form(parser)


def _add_check(commands: Any) -> None:
    what = "check the certificate of a converted model again"
    description = f"{what[0].upper()}{what[1:]}: its files, and with --model the comparison.\n\n{MODEL_HELP}"
    parser = add_command(commands, "check", run_check, what, description, _epilog("check"))
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what convert --output FOLDER --certificate wrote")
    parser.add_argument("--model", metavar="MODEL", help="the original, see above; default: only files are checked")
    _add_weights(parser)


def _add_cache(commands: Any) -> None:
    description = "Shows the CUDA kernels that were compiled and kept on disk."
    parser = add_command(
        commands, "cache", run_cache, "show the compiled kernels on disk, or remove them", description, EXIT_HELP
    )
    parser.add_argument("--clear", action="store_true", help="remove them; they are compiled again when needed")


def _add_model_command(
    commands: Any, name: str, command: Callable[[argparse.Namespace], Result], what: str
) -> argparse.ArgumentParser:
    description = f"{what[0].upper()}{what[1:]}.\n\n{MODEL_HELP}"
    parser = add_command(commands, name, command, what, description, _epilog(name))
    parser.add_argument("model", metavar="MODEL", help="see above")
    _add_weights(parser)
    return parser


def _epilog(name: str) -> str:
    return f"examples:\n{EXAMPLES[name]}\n{EXIT_HELP}"


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="weights, .pth as published or .safetensors; for a timm name or module:callable",
    )
    parser.add_argument("--num-classes", type=_count, metavar="N", help="outputs of the classifier; for a timm name")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (%(default)s)")


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-kernel",
        type=_count,
        metavar="N",
        help=f"from how many taps on a convolution is large ({SWConfig.min_kernel})",
    )
    parser.add_argument("--tile", type=_count, metavar="N", help="side of the small filters; default: by layer")
    parser.add_argument(
        "--select",
        action="append",
        metavar="GLOB",
        help="only layers whose path matches, or that lie below; can be repeated; default: all",
    )


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--form", choices=get_args(Form), help=f"how converted layers run ({SWConfig.form})")
    parser.add_argument(
        "--guarantee",
        action="append",
        choices=get_args(Guarantee),
        help="what they have to keep to; can be repeated; default: nothing but the function",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _bound(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of 0 or more")
    return value


def _size(text: str) -> tuple[int, int]:
    """``S`` or ``HxW``."""
    height, by, width = text.partition("x")
    return _count(height), _count(width if by else height)
