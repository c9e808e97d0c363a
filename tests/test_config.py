import json

import pytest

from sw_transplant import SWConfig


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
