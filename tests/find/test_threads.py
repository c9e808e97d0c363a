"""Conversions in several threads, while others run models: reading patches nothing that others could meet."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from sw_transplant import SWConfig, convert
from tests.sampling import EXHAUSTIVE
from tests.small_models import Parallel, Residual, SelfPadding, conv, conv_bn

CONVERSIONS, THREADS, INFERENCES = 6 if EXHAUSTIVE else 2, 8, 100


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        Residual(Parallel(conv_bn(size=13), conv_bn(size=5), nn.BatchNorm2d(4))),
        SelfPadding(4, 4, 7, groups=4),
        Residual(conv(size=9)),
        nn.BatchNorm2d(4),
    ).eval()


def test_conversions_and_inferences_in_threads() -> None:
    models = [model(seed) for seed in range(THREADS)]
    x = torch.randn(1, 4, 12, 12)
    with torch.no_grad():
        expected = [each(x) for each in models]
    stop, failures = threading.Event(), []

    def infer(number: int) -> None:
        done = 0
        while done < INFERENCES or not stop.is_set():
            with torch.no_grad():
                if not torch.equal(models[number](x), expected[number]):
                    failures.append(number)
            done += 1
            time.sleep(0.002)  # all along the conversions, without taking their time

    def transplant(number: int) -> list[tuple[int, Tensor]]:
        results = []
        for _ in range(CONVERSIONS):
            converted = convert(models[number], SWConfig(min_kernel=5))
            with torch.no_grad():
                results.append((sum("branches" in path for path, _ in converted.named_modules()), converted(x)))
        return results

    with ThreadPoolExecutor(2) as background, ThreadPoolExecutor(THREADS) as pool:
        inferring = [background.submit(infer, number) for number in (0, 1)]
        try:
            converted = list(pool.map(transplant, range(THREADS)))
        finally:
            stop.set()
        for future in inferring:
            future.result()
    assert failures == []
    assert len({layers for results in converted for layers, _ in results}) == 1, (
        "a sum was merged in one, not in another"
    )
    for wanted, results in zip(expected, converted, strict=True):
        for _, got in results:
            assert torch.allclose(got, wanted, atol=1e-5)
