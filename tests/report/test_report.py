"""Pictures and the page: what they show, that they are whole, and that a browser shows the page without a request."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import sw_transplant as sw
from sw_transplant.check.rounding import measure_layers
from sw_transplant.cli import main
from tests.regression.networks import network, square

pytest.importorskip("matplotlib", reason="the extra plot is not installed")

from sw_transplant.report import (
    plot_calibration,
    plot_kernel,
    plot_receptive_field,
    plot_rounding,
    plot_sparsity,
    plot_throughput,
    plot_utilisation,
)
from sw_transplant.report.figures import LONGEST, bars, to_png
from sw_transplant.report.kernels import edges_of
from sw_transplant.report.layers import share_in_use
from sw_transplant.surgery.calibration.options import Calibration

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

TINY = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 9, padding=4, groups=8), nn.Conv2d(8, 8, 7, padding=3, groups=8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )
"""


# ---- kernels


@pytest.mark.parametrize("config", [sw.SWConfig(tile=3), sw.SWConfig(edges=3)], ids=["laid out", "edges"])
def test_edges_add_up_to_the_kernel(config: sw.SWConfig) -> None:
    original = square()
    layer = sw.convert(original, config)[1]
    (branch,) = layer.parts()
    edges = edges_of(layer, branch, 2)
    assert len(edges) == config.edge_count
    kernel = sum(edge.kernel for edge in edges)  # filled to whole tiles where edges place them in any order
    torch.testing.assert_close(kernel[:9, :9], original[1].weight[2, 0].detach())
    assert not kernel[9:].any()
    assert not kernel[:, 9:].any()


def test_edges_of_the_papers_module_add_up() -> None:
    layer = sw.convert(square(), sw.SWConfig(mode="shiftwise", ghost=0.0))[1].eval()
    branches = [part for part in layer.parts() if not part.is_identity]
    found = [edges_of(layer, branch, 1) for branch in branches]
    assert [len(edges) for edges in found] == [4, 4, 4]
    kernels, _ = layer.kernels()
    total = sum(float(edge.kernel.sum()) for edges in found for edge in edges)
    scale = 1 / (1 + 1e-5) ** 0.5  # of the fresh BatchNorms
    torch.testing.assert_close(sum(float(k.weight[1].sum()) for k in kernels), total * scale, rtol=1e-4, atol=1e-5)


def texts(figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title)}


def test_picture_of_a_kernel() -> None:
    converted = sw.convert(network(), sw.SWConfig(edges=2))
    figure = plot_kernel(converted[2], channel=3)
    shown = texts(figure)
    assert {"branch 1, 9x3: assembled", "branch 2, 3x9: edge 2", "0", "2"} <= shown
    assert to_png(figure).startswith(b"\x89PNG")
    image = figure.axes[0].images[0]
    assert float(abs(image.get_array()).max()) <= image.get_clim()[1]  # nothing is beyond the scale of greys
    with pytest.raises(ValueError, match=r"channel 4, expected 0 to 3"):
        plot_kernel(converted[2], channel=4)


# ---- layers


def test_pictures_of_layers() -> None:
    converted = sw.convert(network())
    with torch.no_grad():
        converted[3].branches[0].bank[0] = 0  # one of four channels
    assert share_in_use(converted[3]) == 0.75
    assert "75" in texts(plot_sparsity(converted))
    layers = measure_layers(converted, lambda model: model(torch.randn(1, 3, 12, 12)))
    assert len(plot_rounding(layers).axes[0].patches) == 4
    figure = plot_utilisation(converted, {layer.path: layer.shape[2:] for layer in layers})
    assert figure.axes[0].get_yticklabels()[0].get_text() == "1, map 12x12"
    assert len(plot_utilisation(converted, 14).axes[0].patches) == 4
    with pytest.raises(ValueError, match="plot_sparsity: Sequential has no converted layer"):
        plot_sparsity(network())


def test_many_bars_are_cut_and_the_title_says_so() -> None:
    names = [f"layer {i}" for i in range(LONGEST + 5)]
    axes = bars("Title", names, {"a": range(45), "b": range(45)}, "x", ".0f").axes[0]
    assert len(axes.patches) == 2 * LONGEST
    assert "the first 40 of 45" in axes.get_title()
    assert len({patch.get_hatch() for patch in axes.patches}) == 2  # they differ without colour


def test_picture_of_times(tmp_path: Path) -> None:
    axes = plot_throughput(ROOT / "benchmarks" / "results" / "cpu.json").axes[0]
    assert len(axes.patches) > 20
    for content in ("[]", "{}", '{"rows": [{"native": 1}]}', '{"rows": [3]}', "x"):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(ValueError, match="plot_throughput"):
            plot_throughput(tmp_path / "r.json")


def test_pictures_of_calibrated_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 9, padding=4, groups=4), nn.ReLU()).eval()
    settings = Calibration(torch.randn(8, 3, 16, 16), progress=False)
    converted = sw.convert(original, sw.SWConfig(mode="shiftwise"), calibration=settings)
    (found,) = settings.report.layers
    shown = f"{100 * found.response_error:.3g}"
    assert shown in texts(plot_calibration(converted))
    sw.save(converted, tmp_path)
    assert shown in texts(plot_calibration(sw.load(original, tmp_path)))  # the folder keeps it
    axes = plot_calibration(settings.report).axes[0]
    assert len(axes.patches) == 4
    assert len({patch.get_hatch() for patch in axes.patches}) == 4  # they differ without colour
    lengths = [patch.get_width() for patch in axes.patches]
    expected = [found.response_error, found.orders_after, found.orders_before, found.strips]
    assert lengths == pytest.approx([100 * value for value in expected])
    with pytest.raises(ValueError, match="no layer was calibrated"):
        plot_calibration(sw.convert(original))
    report = sw.verify(original, converted, torch.randn(1, 3, 12, 12), bounds=10, certificate=tmp_path / "c.json")
    from sw_transplant.check.certificate import Certificate
    from sw_transplant.report import write_report

    write_report(tmp_path / "r.html", "x", original, converted, report, (), Certificate.read(tmp_path / "c.json"))
    assert '<img alt="calibration"' in (tmp_path / "r.html").read_text()


def test_picture_of_receptive_fields() -> None:
    size, reach = 21, 4
    matrix = torch.zeros(size, size, dtype=torch.float64)
    centre = size // 2
    matrix[centre - reach : centre + reach + 1, centre - reach : centre + reach + 1] = 1.0
    figure = plot_receptive_field({"one": matrix, "two": torch.ones(size, size)})
    first, second = figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["one", "two"]
    assert torch.equal(torch.as_tensor(first.images[0].get_array()), matrix)  # its logarithm is at most 1, too
    lines = [line for line in first.lines if line.get_color() == "black"]
    assert len({line.get_linestyle() for line in lines}) == 4  # they differ without colour
    area = (2 * reach + 1) ** 2 / size**2
    assert lines[-1].get_label() == f"t = 99%: r = {100 * area:.1f}%"
    assert (lines[-1].get_xdata().min(), lines[-1].get_xdata().max()) == (centre - reach - 0.5, centre + reach + 0.5)
    whole = [line for line in second.lines if line.get_color() == "black"][-1]
    assert (whole.get_xdata().min(), whole.get_xdata().max()) == (-0.5, size - 0.5)
    with pytest.raises(ValueError, match="no matrix"):
        plot_receptive_field({})


# ---- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "page_model.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        words = ["report", "page_model:build", "--size", "16", "--batch-size", "2", "--out", "out/report.html"]
        assert main([*words, "--receptive-field", "2", "--map", "2"]) == 0
        assert main([*words, "--map", "2"]) == 2
        assert main([*words, "--receptive-field", "--map", "nowhere"]) == 2
    return folder / "out" / "report.html"


def test_page_holds_everything(page: Path) -> None:
    text = page.read_text()
    for words in (
        "OK: the same function",
        "Large depthwise convolutions to convert",
        "Shiftwise layers",
        "&quot;digest",
    ):
        assert words in text
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', text)
    assert [name for name, _ in pictures] == [
        *("rounding", "tiles in use", "utilisation", "receptive field", "kernel of 1", "kernel of 2")
    ]
    assert all(base64.b64decode(content).startswith(b"\x89PNG") for _, content in pictures)
    targets = re.findall(r'(?:src|href)="([^"]{0,5})', text)
    assert {target for target in targets if not target.startswith("#")} == {"data:"}
    assert "<script" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian: apt install chromium)")
def test_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    """No console error, no request, every picture decoded. A script that reports is added to a copy of the page."""
    script = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "widths: [...document.images].map(i => i.naturalWidth),"
        "requests: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
        "}); });</script></body>"
    )
    text = page.read_text().replace("style-src", "script-src 'unsafe-inline'; style-src").replace("</body>", script)
    (tmp_path / "page.html").write_text(text)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1].replace("&quot;", '"'))
    assert seen["requests"] == []
    assert len(seen["widths"]) == 6
    assert min(seen["widths"]) > 300


def test_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["report", "convnext_atto", "--out", str(tmp_path / "r.html")]) == 2
    assert "sw-transplant[plot]" in capsys.readouterr().err
    assert main(["report", "convnext_atto", "--out", str(tmp_path)]) == 2


def test_a_failed_comparison_says_so(tmp_path: Path) -> None:
    from sw_transplant.check.certificate import Certificate
    from sw_transplant.report import write_report

    original = square()
    converted = sw.convert(original)
    with torch.no_grad():
        converted[1].branches[0].bank.add_(1)
    report = sw.verify(original, converted, input_size=12, batch_size=1, certificate=tmp_path / "certificate.json")
    certificate = Certificate.read(tmp_path / "certificate.json")
    write_report(tmp_path / "r.html", "<b>", original, converted, report, (), certificate)
    text = (tmp_path / "r.html").read_text()
    assert "FAILED: not the same function" in text
    assert "<h1>&lt;b&gt;</h1>" in text
    assert isinstance(original[1], nn.Conv2d)
