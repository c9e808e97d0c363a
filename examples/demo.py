"""Converts a small trained network and shows that it still gives the same answers. Needs no download, half a minute.

    make demo

The network is a SLaK, with kernels of 51x5 and 5x51, that reads digits; ``train_digits_slak.py`` trained it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from typing import NamedTuple

import torch
from digits import Digits, digits, load_trained, without_strips
from torch import Tensor, nn

import sw_transplant as sw
from sw_transplant.check.verify import VerifyReport
from sw_transplant.models import SLaK
from sw_transplant.tables import render_table

INTRODUCTION = """\
SLaK looks at images through long strips: depthwise kernels of 51x5 and 5x51 weights. ShiftwiseConv needs only small
n x n filters: it cuts every strip into tiles, and adds up their responses, each shifted to its tile's place. The tiles
together are the strip, so a trained network can be converted as it is, without training: the answers stay the same.

Two forms of the converted network run here. "shift" is the paper's: small convolutions, then shift and add. "assembled"
shifts the weights instead: it puts the tiles back in their places and runs one large convolution per strip.
"""

REMARKS = """
"shift" makes a map of responses for every tile, which takes its time on a CPU; convert(model) chooses a form by itself.
The last line is no conversion but a control: without its strips the network is another one, and the comparison says so.
"""

WHAT_NEXT = """\
What next? With timm installed, the same three lines convert one of its models, or your own:

    import timm, sw_transplant as sw
    model = timm.create_model("convnext_atto", pretrained=True)   # downloads the weights
    model = sw.convert(model)                                     # sw.inspect_model(model) tells what, and why not

examples/convert_huggingface.py fine-tunes a converted model, examples/verify_slak.py checks an official SLaK on
ImageNet; docs/examples.md tells how to run them.
"""


def main() -> int:
    torch.set_num_threads(1)  # enough for a network this small, and the times vary less
    trained = load_trained()
    original, data = trained.model, digits(trained.preprocessing)
    print(INTRODUCTION)
    heading("1. Look: what would be converted")
    print(sw.inspect_model(original))

    heading("2. Convert, and compare with the original on digits that were not used for training")
    steps = {}
    for form in ("shift", "assembled"):
        name = f'converted, form "{form}"'
        steps[name] = Step.of(sw.convert(original, sw.SWConfig(form=form)), original, data)
        print(f"\n{name}\n{steps[name].report}")

    heading("3. Go back to plain convolutions; save and load")
    converted = steps[name].model
    steps["converted and merged back"] = Step.of(sw.merge(converted), original, data)
    steps["converted, saved and loaded"] = Step.of(saved_and_loaded(converted, original), original, data)
    control = Step.of(without_strips(original), original, data)
    rows = {"original": Step.of(original, original, data), **steps, "control: strips set to zero": control}
    print(result_table(rows))
    print(REMARKS)

    failed = [name for name, step in steps.items() if not step.same]
    if control.same:
        failed.append("the control, which should differ")
    if failed:
        print(f"FAILED: {'; '.join(failed)}")
        return 1
    print("OK: every converted network gives the answers of the original.\n")
    print(WHAT_NEXT)
    return 0


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


class Step(NamedTuple):
    """A network, and how it compares with the original."""

    model: nn.Module
    report: VerifyReport
    milliseconds: float

    @classmethod
    def of(cls, model: nn.Module, original: nn.Module, data: Digits) -> Step:
        report = sw.verify(original, model, (data.images, data.labels), batch_size=90)
        return cls(model, report, milliseconds_per_image(model, data.images))

    @property
    def changed(self) -> int:
        """Images for which the two networks name another digit."""
        agreed = self.report.same_top1
        return self.report.images if agreed is None else self.report.images - agreed.count

    @property
    def same(self) -> bool:
        """Whether all numbers are equal within rounding, and the same digit is named for every image."""
        return self.report.ok and self.changed == 0


@torch.no_grad()
def milliseconds_per_image(model: nn.Module, images: Tensor) -> float:
    """Of the fastest batch: the others may have waited for another program."""
    seconds = []
    for batch in images.split(45):
        start = time.perf_counter()
        model(batch)
        seconds.append((time.perf_counter() - start) / len(batch))
    return 1000 * min(seconds)


def saved_and_loaded(model: nn.Module, original: SLaK) -> nn.Module:
    """The model by way of a file. It is loaded into an untrained SLaK: every weight has to come from the file."""
    with tempfile.TemporaryDirectory() as folder:
        sw.save(model, folder)
        untrained = copy.deepcopy(original)
        for parameter in untrained.parameters():
            nn.init.normal_(parameter)
        return sw.load(untrained, folder)


def result_table(steps: dict[str, Step]) -> str:
    rows = []
    for name, step in steps.items():
        difference = max(output.max_abs for output in step.report.outputs)
        right, time_each = str(step.report.top1_converted), f"{step.milliseconds:.2f}"
        rows.append([name, right, str(step.changed), f"{difference:.1e}", time_each])
    headers = ["network", "right", "answers changed", "largest difference of a logit", "ms per image"]
    return render_table("", headers, rows)


if __name__ == "__main__":
    sys.exit(main())
