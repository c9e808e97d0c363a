import json

import pytest

from sw_transplant import SWConfig
from sw_transplant.science.ladder import LADDER


def test_round_trip_through_json():
    config = SWConfig(min_kernel=5, tile=3, form="shift")
    assert SWConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "other"},
        {"form": "fast"},
        {"min_kernel": 0},
        {"min_kernel": 7.0},
        {"tile": 0},
        {"tile": True},
        {"edges": 0},
        {"paths": 1.5},
        {"ghost": 1.0},
        {"ghost": -0.1},
        {"seed": -1},
        {"residual": "no"},
        {"orders": "sorted"},
    ],
)
def test_values_outside_their_range_are_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"SWConfig.{name}: got .*expected"):
        SWConfig(**values)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown fields.*'colour'"):
        SWConfig.from_dict({"colour": 2})
    with pytest.raises(ValueError, match=r"expected an object"):
        SWConfig.from_dict([1])


def test_presets_are_the_steps_of_the_paper():
    assert SWConfig.preset("sw#1") == SWConfig(mode="laid_out", tile=5, form="shift")
    paper = SWConfig(mode="shiftwise", tile=3, edges=4, paths=2, ghost=0.23, residual=True)
    assert SWConfig.preset("sw#11") == SWConfig.preset("sw#24") == paper
    assert SWConfig.preset("sw#3") == SWConfig(
        mode="shiftwise", tile=5, edges=1, paths=1, ghost=0.0, residual=True, orders="opposite"
    )
    assert {name: (step.accuracy_120, step.accuracy_300) for name, step in LADDER.items() if step.accuracy_300} == {
        "sw#20": (82.27, 82.70),
        "sw#24": (82.27, 83.39),
        "sw#26": (None, 82.99),
        "sw#27": (None, 83.46),
    }
    with pytest.raises(ValueError, match=r"got 'sw#2', expected one of sw#0, sw#1, "):
        SWConfig.preset("sw#2")
