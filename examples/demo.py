"""Converts a small trained network and shows that it still gives the same answers. Needs no download, half a minute.

    make demo

The network is a SLaK, with kernels of 51x5 and 5x51, that reads digits; ``train_digits_slak.py`` trained it.
"""

from __future__ import annotations

import copy
import sys
import tempfile

from digits import Digits, digits, load_trained, without_strips
from torch import nn

import sw_transplant as sw
from sw_transplant.models import SLaK
from sw_transplant.tables import render_table
from sw_transplant.verify import VerifyReport

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
    trained = load_trained()
    original, data = trained.model, digits(trained.preprocessing)
    print(INTRODUCTION)
    heading("1. Look: what would be converted")
    print(sw.inspect_model(original))

    heading("2. Convert, and compare with the original on digits that were not used for training")
    converted = {form: sw.convert(original, sw.SWConfig(form=form)) for form in ("shift", "assembled")}
    reports = {}
    for form, model in converted.items():
        step = f'converted, form "{form}"'
        reports[step] = compare(original, model, data)
        print(f"\n{step}\n{reports[step]}")

    heading("3. Go back to plain convolutions; save and load")
    reports["converted and merged back"] = compare(original, sw.merge(converted["assembled"]), data)
    reports["converted, saved and loaded"] = compare(original, saved_and_loaded(converted["assembled"], original), data)
    control = compare(original, without_strips(original), data)
    print(result_table(reports, control))
    print(REMARKS)
    if trained.right != (now := control.top1_original.count):
        print(f"The original got {trained.right} right where it was trained, and {now} on this machine.\n")

    failed = [step for step, report in reports.items() if not same(report)]
    if same(control):
        failed.append("the control, which should differ")
    if failed:
        print(f"FAILED: {'; '.join(failed)}")
        return 1
    print("OK: every converted network gives the answers of the original.\n")
    print(WHAT_NEXT)
    return 0


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def compare(original: nn.Module, model: nn.Module, data: Digits) -> VerifyReport:
    return sw.verify(original, model, (data.images, data.labels), batch_size=90)


def same(report: VerifyReport) -> bool:
    """Numbers equal within rounding, and the same digit named for every image."""
    return report.ok and changed(report) == 0


def changed(report: VerifyReport) -> int:
    return report.images - report.same_top1.count


def saved_and_loaded(model: nn.Module, original: SLaK) -> nn.Module:
    """The model by way of a file. It is loaded into an untrained SLaK: every weight has to come from the file."""
    with tempfile.TemporaryDirectory() as folder:
        sw.save(model, folder)
        untrained = copy.deepcopy(original)
        for parameter in untrained.parameters():
            nn.init.normal_(parameter)
        return sw.load(untrained, folder)


def result_table(reports: dict[str, VerifyReport], control: VerifyReport) -> str:
    first = next(iter(reports.values()))
    rows = [["original", str(first.top1_original), "", "", f"{1000 / first.images_per_second_original:.2f}"]]
    for step, report in [*reports.items(), ("control: strips set to zero", control)]:
        difference = max(output.max_abs for output in report.outputs)
        speed = f"{1000 / report.images_per_second_converted:.2f}"
        rows.append([step, str(report.top1_converted), str(changed(report)), f"{difference:.1e}", speed])
    headers = ["network", "right", "answers changed", "largest difference of a logit", "ms per image"]
    return render_table(f"{first.images} digits", headers, rows)


if __name__ == "__main__":
    sys.exit(main())
