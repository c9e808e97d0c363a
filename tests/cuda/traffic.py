"""Bytes that a network reads and writes in channels_last, counted on its traced graph: of what, copies of maps are.

    python -m tests.cuda.traffic --json benchmarks/results/kernel_counts.json

A forward pass and a training step of SLaK-T are traced with fake tensors: operators, shapes and strides, and nothing is
computed. Every operator that is no view reads its operands and writes its results, once: what eager PyTorch does, and
more than a compiler leaves. A copy of a map is a clone of it, in its dtype. "Before" are kernels for contiguous maps
only: they copy each channels_last map that comes, and each result, inside of the operator, where no graph shows it;
what is added here is one copy for each such operand and result of theirs. In 16 bits, all is half of it. No GPU is
needed, and nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

import sw_transplant.models  # noqa: F401  makes SLaK known to timm
from sw_transplant import convert, set_form

CLONES = {
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.copy.default,
    torch.ops.aten._to_copy.default,
}


def traced(model: nn.Module, x: Tensor, training: bool) -> Graph:
    """The operators of a forward pass, or of one with the gradients of all parameters."""

    parameters = dict(model.train(training).named_parameters())
    held = {**parameters, **dict(model.named_buffers())}

    def forward(held: dict[str, Tensor], x: Tensor) -> Any:
        with torch.no_grad():
            return functional_call(model, held, (x,))

    def step(held: dict[str, Tensor], x: Tensor) -> Any:
        loss = functional_call(model, held, (x,)).float().sum()
        return torch.autograd.grad(loss, [held[name] for name in parameters])

    # Tables that layers keep are tensors of this machine.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in held.items()}
        graph: Graph = make_fx(step if training else forward)(fake, mode.from_tensor(x)).graph
    return graph


def count(graph: Graph, batch: int) -> dict[str, int]:
    """Bytes of all operators and of those with a Toeplitz kernel, and how many copies of maps there are, and of what
    bytes: now, and more of them with kernels for contiguous maps only."""
    found = dict.fromkeys(("all", "toeplitz", "copies", "copied", "copies more", "copied more"), 0)
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or _is_view(node):
            continue
        given, results = [_value(each) for each in node.all_input_nodes], _tensors(node)
        moved = sum(map(_bytes, given)) + sum(map(_bytes, results))
        found["all"] += moved
        if "toeplitz" in str(node.target):
            found["toeplitz"] += moved
            for each in [*given, *results]:
                if _is_map(each, batch) and not each.is_contiguous():
                    found["copies more"] += 1
                    found["copied more"] += 2 * _bytes(each)
        elif node.target in CLONES and given[0].dtype == results[0].dtype and _is_map(given[0], batch):
            found["copies"] += 1
            found["copied"] += moved
    return found


def _is_map(value: Tensor, batch: int) -> bool:
    return value.dim() == 4 and value.shape[0] == batch and value.shape[2] * value.shape[3] > 1


def _is_view(node: Node) -> bool:
    """Whether it gives its operand as it is; not so what writes to it."""
    aliases = [each.alias_info for each in node.target._schema.returns]  # type: ignore[union-attr]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _value(node: Node) -> Tensor:
    value = node.meta["val"]
    return value if isinstance(value, Tensor) else torch.empty(0)


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta["val"]
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Tensor)]


def _bytes(value: Tensor) -> int:
    return min(value.numel(), value.untyped_storage().nbytes() // value.itemsize) * value.itemsize


def rows(batch: int) -> list[dict[str, Any]]:
    """One for each pass, every layer in form "toeplitz"."""
    model = convert(timm.create_model("slak_tiny")).to(memory_format=torch.channels_last)
    set_form(model, "toeplitz")
    x = torch.empty(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    table = []
    for training in (False, True):
        found = count(traced(model, x, training), batch)
        row = {
            "network": "slak_tiny",
            "batch": batch,
            "dtype": "float32",
            "pass": "training step" if training else "forward",
            "copies of maps before": found["copies"] + found["copies more"],
            "copies of maps": found["copies"],
            "GB of copies before": round((found["copied"] + found["copied more"]) / 1e9, 2),
            "GB of copies": round(found["copied"] / 1e9, 2),
            "GB of toeplitz operators": round(found["toeplitz"] / 1e9, 2),
            "GB of all operators before": round((found["all"] + found["copied more"]) / 1e9, 2),
            "GB of all operators": round(found["all"] / 1e9, 2),
        }
        table.append(row)
        print(json.dumps(row), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    command = f"python -m tests.cuda.traffic --batch {options.batch} --json benchmarks/results/kernel_counts.json"
    found = {"command": command, "rows": rows(options.batch)}
    if options.json:
        content = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps({**content, "traffic": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
