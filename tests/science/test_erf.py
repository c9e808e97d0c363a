"""Effective receptive fields: the definitions, by hand; and that converting a network does not change them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sw_transplant import SWConfig, convert
from sw_transplant.cli import main
from sw_transplant.models import SLaK
from sw_transplant.science.erf import (
    SHARES,
    effective_receptive_field,
    high_contribution_ratio,
    high_contribution_square,
    log_contributions,
    relative_contributions,
)


def small_slak() -> nn.Module:
    torch.manual_seed(0)
    return SLaK(
        depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), kernel_size=(13, 11, 9, 7, 5), num_classes=5,
        layer_scale_init_value=1.0,
    )  # fmt: skip


def test_the_squares_of_a_uniform_matrix_are_the_published_ones() -> None:
    squares = [high_contribution_square(torch.ones(1024, 1024), share) for share in SHARES]
    assert [square.side for square in squares] == [459, 561, 725, 1019]
    assert [round(square.ratio, 3) for square in squares] == [0.201, 0.3, 0.501, 0.99]


@pytest.mark.parametrize("size", [32, 33])
def test_squares_against_sums_by_hand(size: int) -> None:
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    logarithm = np.log10(matrix.numpy() + 1)
    centre = size // 2
    for share in (0.05, 0.4, 0.8):
        for i in range(1, size - centre):
            inside = logarithm[centre - i : centre + i + 1, centre - i : centre + i + 1].sum()
            if inside / logarithm.sum() > share:
                break
        assert high_contribution_square(matrix, share).side == 2 * i + 1
        assert high_contribution_ratio(matrix, share) == pytest.approx(((2 * i + 1) / size) ** 2)


def test_the_logarithm_depends_on_the_scale_and_the_picture_does_not() -> None:
    x = torch.linspace(-1, 1, 64, dtype=torch.float64)
    matrix = torch.exp(-20 * (x[:, None] ** 2 + x**2))
    assert high_contribution_ratio(matrix * 1e4, 0.5) > high_contribution_ratio(matrix, 0.5)
    torch.testing.assert_close(relative_contributions(matrix * 1e4), relative_contributions(matrix))
    assert log_contributions(matrix * 7).max() == 1


def test_of_one_convolution_it_is_the_positive_part_of_its_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 1, 5, padding=2), nn.Identity()).double()
    nn.init.constant_(model[0].bias, 100.0)  # the centre is positive
    images = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    matrix = effective_receptive_field(model, images, size=9, map="0")
    wanted = torch.zeros(9, 9, dtype=torch.float64)
    wanted[2:7, 2:7] = model[0].weight[0].detach().relu().sum(0)
    torch.testing.assert_close(matrix, wanted)
    nn.init.constant_(model[0].bias, -100.0)
    assert not effective_receptive_field(model, images, size=9, map=lambda model, x: model(x)).any()


def test_converting_changes_nothing() -> None:
    model = small_slak().double().train()
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    matrix = effective_receptive_field(model, images, size=64, batch_size=2)
    assert model.training
    assert matrix.shape == (64, 64)
    converted = convert(model, SWConfig(tile=5))
    again = effective_receptive_field(converted, [(image[None], None) for image in images], size=64)
    torch.testing.assert_close(again, matrix, rtol=1e-6, atol=1e-6 * float(matrix.max()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_without_finite_gradients_are_left_out_and_counted() -> None:
    model = small_slak()
    images = torch.randn(3, 3, 64, 64)
    wanted = effective_receptive_field(model, images[:2], size=64)
    images[2] = float("nan")
    with pytest.warns(UserWarning, match="1 of 3 images give gradients that are not finite; they are left out"):
        matrix = effective_receptive_field(model, images, size=64)
    torch.testing.assert_close(matrix, wanted)
    with pytest.raises(ValueError, match="all 1 images give gradients that are not finite"):
        effective_receptive_field(model, images[2:], size=64)


def test_what_is_no_map_or_no_matrix_is_refused() -> None:
    x = torch.zeros(1, 3, 8, 8)
    for model, place, message in (
        (nn.Sequential(nn.Conv2d(3, 2, 1)), None, "has neither stages nor forward_features"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), "1", "has no module '1'"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), "1", r"the map is \(1, 128\)"),
    ):
        with pytest.raises(ValueError, match=message):
            effective_receptive_field(model, x, size=8, map=place)
    with pytest.raises(ValueError, match="there are no images"):
        effective_receptive_field(small_slak(), [], size=64)
    for matrix in (torch.zeros(4, 4), torch.ones(4, 5), torch.full((4, 4), float("nan")), -torch.ones(4, 4)):
        with pytest.raises(ValueError, match="expected a square one of finite contributions"):
            high_contribution_square(matrix, 0.5)
    with pytest.raises(ValueError, match=r"share 1\.5"):
        high_contribution_square(torch.ones(4, 4), 1.5)


def test_the_command_line_draws_and_tabulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / str(i) / "image.png")
    out = tmp_path / "erf.png"
    command = ["erf", "convnext_atto", "--convert", "--data", str(tmp_path / "data"), "--size", "64", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "convnext_atto, converted" in text
    first, second = (line.split()[-4:] for line in text.splitlines() if line.startswith(" convnext_atto"))
    assert first == second
    with Image.open(out) as image:
        assert image.size[0] > 100
    assert main([*command[:3], "--data", str(tmp_path / "nothing")]) == 2
