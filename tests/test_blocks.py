"""Every block of Python in the README and in docs: it compiles, and it runs, with small stand-ins for what it is given.

The blocks of a page share their names, in the order of the page, as a reader runs them. Those that need what no machine
of the tests has are listed with the reason, and only compiled. Blocks of the design pages are in test_documents.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sw_transplant as sw
from tests.small_models import Residual, conv_bn
from tests.test_documents import ROOT, blocks

PAGES = {
    str(page.relative_to(ROOT)): blocks(page, "python")
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    if blocks(page, "python")
}
NOT_RUN = {
    ("docs/huggingface.md", 3): "trains with checkpoints: tests/hf",
    ("docs/performance.md", 1): "a GPU: tests/test_runtime_gpu.py",
    ("docs/receptive-fields.md", 0): "maps of 1024 x 1024 take minutes: tests/science",
    ("docs/reproducing.md", 0): "published weights",
    ("docs/scaling.md", 0): "several processes: tests/scale",
    ("docs/scaling.md", 1): "several processes: tests/scale",
    ("docs/scaling.md", 2): "several processes: tests/scale",
    ("docs/scaling.md", 3): "several processes: tests/scale",
    ("docs/serving.md", 0): "a C++ compiler: tests/test_serving.py",
    ("docs/sparsity.md", 1): "published weights",
    ("docs/sparsity.md", 3): "trains: tests/sparsity",
    ("docs/transplanting.md", 3): "ImageNet, and published weights",
}
BEFORE = {
    (
        "docs/transplanting.md",
        2,
    ): "from sw_transplant.sparsity import FilterSparsity\n"
    "sparsity = FilterSparsity(student, 0.3, total_steps=10)\n"
    "sparsity.initialise(lambda: student(images).square().mean())\n",
}
"""What the text before a block says has been done."""
SMALL = {
    "slak_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "kernel_size": (9, 9, 9, 9, 5), "width_factor": 1.0},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
}
"""Networks by name are built smaller: the blocks show calls, not accuracies."""


def network(**options: Any) -> nn.Module:
    """What a page calls ``model`` without saying where it is from."""
    torch.manual_seed(0)
    body = nn.Sequential(Residual(conv_bn(4, 9)), Residual(conv_bn(4, 9)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), body, head)
    return model if not options else sw.convert(model, sw.SWConfig(**options))


def stand_in(page: str, small: Callable[..., nn.Module]) -> dict[str, Any]:
    """What the text of a page takes as given."""
    import timm

    images = torch.randn(8, 3, 24, 24)
    given: dict[str, Any] = {"sw": sw, "torch": torch, "timm": timm, "images": images, "F": nn.functional}
    if page == "docs/fine-tuning.md":
        given |= {"model": network(edges=2), "rate": 1e-3}
    elif page == "docs/huggingface.md":
        import transformers

        config = transformers.ConvNextConfig(
            hidden_sizes=[8] * 4, depths=[1] * 4, num_labels=5, image_size=32, architectures=["ConvNext"]
        )
        original = transformers.ConvNextForImageClassification(config)
        original.save_pretrained("original")
        for folder in ("original", "folder"):
            transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
        given |= {"original": original}
    elif page == "docs/performance.md":
        model = sw.convert(small("convnext_atto"))
        layer = next(module for module in model.modules() if isinstance(module, sw.ShiftwiseConv2d))
        given |= {"model": model, "layer": layer, "images": torch.randn(2, 3, 64, 64)}
    elif page == "docs/shiftwise.md":
        from PIL import Image

        given |= {"Image": Image}
    elif page == "docs/sparsity.md":
        labels = torch.arange(8) % 5
        loader = [(images, labels)] * 2
        given |= {"model": network(), "labels": labels, "loader": loader, "epochs": 2}
        given["model"] = sw.convert(given["model"])
    elif page == "docs/transplanting.md":
        given |= {"model": network().eval(), "images": torch.randn(32, 3, 48, 48)}
    return given


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., nn.Module]:
    """timm builds networks smaller, without downloads, and the current folder is an empty one."""
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def created(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        return create(name, **{**SMALL.get(name, {}), **options})

    monkeypatch.setattr(timm, "create_model", created)
    monkeypatch.chdir(tmp_path)
    return created


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page: str, small: Callable[..., nn.Module]) -> None:
    if "transformers" in "".join(PAGES[page]):
        pytest.importorskip("transformers")
    names = {"__name__": "example", **stand_in(page, small)}
    for number, block in enumerate(PAGES[page]):
        code = compile(block, f"{page}, block {number}", "exec")
        if (page, number) not in NOT_RUN:
            exec(BEFORE.get((page, number), ""), names)
            exec(code, names)


def test_what_is_not_run_is_there() -> None:
    assert [(page, number) for page, number in NOT_RUN if number >= len(PAGES.get(page, ()))] == []
    assert sum(map(len, PAGES.values())) > 2 * len(NOT_RUN)
