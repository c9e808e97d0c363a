"""Compiling ahead: the model is called as it will be, what is missing is compiled together, nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sw_transplant as sw
from sw_transplant.cuda import launch
from sw_transplant.cuda.sources import Factory, Job
from sw_transplant.surgery import warming


class Launches(nn.Module):
    """Stands for a model on a GPU: what it would launch is noted, in the forward and in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self._launch("forward")
        y = self.bn(self.conv(x))
        if y.requires_grad:
            y.register_hook(lambda _: self._launch("backward"))
        return {"y": torch.dropout(y, 0.5, self.training)}

    def _launch(self, name: str) -> None:
        job = Job(Factory("somewhere", name), (), (9, 0))
        if launch._Wanted.jobs is not None:
            launch._Wanted.jobs.setdefault(job)
            self.calls.append(f"{name} left out")
        else:
            self.calls.append(name)


@pytest.mark.parametrize("train", [False, True])
def test_what_is_missing_is_compiled_between_two_calls(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Launches().train(train), torch.randn(2, 2, 8, 8)
    compiled: list[str] = []

    def compile_together(jobs, processes):
        compiled.extend(job.factory.name for job in jobs)
        model.calls.append(f"compiled by {processes}")

    monkeypatch.setattr(warming, "compile_together", compile_together)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    names = ["forward", "backward"] if train else ["forward"]
    assert sw.warm_up(model, x, processes=3) == len(names)
    assert compiled == names
    assert model.calls == [*(f"{name} left out" for name in names), "compiled by 3", *names]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert launch._Wanted.jobs is None


def test_after_an_error_launches_run_again() -> None:
    with pytest.raises(RuntimeError):
        sw.warm_up(Launches(), torch.randn(2, 3, 8, 8))
    assert launch._Wanted.jobs is None
