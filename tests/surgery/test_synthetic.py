"""Images where there are none: what is painted looks like images, and comes closer to what the BatchNorms have seen."""

import pytest
import torch
from torch import nn

from sw_transplant import SWConfig, convert
from sw_transplant.surgery.calibration import Calibration
from sw_transplant.surgery.calibration.synthetic import image_shape, paint, synthesise
from tests.small_models import conv_bn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.large, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), conv_bn(8, 9), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.large(self.stem(x))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(30):
            model(2 * torch.rand(16, 3, 24, 24) - 0.3)  # what its BatchNorm has seen
    return model.train()


def test_painted_images_have_edges_and_surfaces():
    images = paint((3, 32, 40), 8, 0)
    assert images.shape == (8, 3, 32, 40)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-5)
    steps = images.diff(dim=3).abs().flatten()
    assert float(steps.quantile(0.5)) < 0.3  # neighbours are alike ...
    assert float(steps.quantile(0.99)) > 0.9  # ... but for the edges
    assert torch.equal(images, paint((3, 32, 40), 8, 0))
    assert not torch.equal(images, paint((3, 32, 40), 8, 1))


def test_statistics_come_closer_and_the_model_stays(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def strangeness(images):
        norm, seen = net.large[1], []
        hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            net.eval()(images)
        hook.remove()
        net.train()
        deviation = (norm.running_var + norm.eps).sqrt()
        mean = (seen[0].mean((0, 2, 3)) - norm.running_mean) / deviation
        return float(mean.square().mean() + (seen[0].std((0, 2, 3)) / deviation - 1).square().mean())

    painted, moved = (synthesise(net, (3, 24, 24), 16, steps=steps) for steps in (0, 20))
    assert strangeness(moved) < 0.7 * strangeness(painted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_a_model_is_converted_from_nothing(net):
    settings = {"input_size": 24, "count": 16, "swaps": 0, "progress": False}
    calibration = Calibration("synthetic", **settings)
    config = SWConfig(mode="shiftwise", ghost=0.0)
    one, other = convert(net, config, calibration=calibration), convert(net, config, calibration=calibration)
    assert calibration.report.layers[0].positions == 15 * 144
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with torch.no_grad():
        x = torch.rand(8, 3, 24, 24)
        wanted = net.eval()(x)
        missed = [float((model.eval()(x) - wanted).norm()) for model in (one, convert(net, config))]
    assert missed[0] < missed[1]


def test_the_size_is_the_models_or_has_to_be_given(net):
    assert image_shape(net, (20, 24)) == (3, 20, 24)
    assert image_shape(net, (1, 20, 24)) == (1, 20, 24)
    net.pretrained_cfg = {"input_size": (3, 28, 28)}
    assert image_shape(net, None) == (3, 28, 28)
    del net.pretrained_cfg
    with pytest.raises(ValueError, match=r"give Calibration\('synthetic', input_size=...\)"):
        convert(net, SWConfig(mode="shiftwise"), calibration="synthetic")
