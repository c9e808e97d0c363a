"""Which of many cases every run of the tests looks at; the others are for `make test-all`."""

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

EXHAUSTIVE = os.environ.get("SW_EXHAUSTIVE") == "1"
"""Whether the long tail runs as well: `make test-all`."""


def sample(cases: Iterable[Any], quick: Collection[Any], *, unpack: bool = True) -> list[Any]:
    """All cases for ``parametrize``, those outside of ``quick`` marked exhaustive.

    ``quick`` should have every value of every parameter at least once, and the pairs that share code of their own. A
    tuple has a value for each of several parameters, or is one value without ``unpack``.
    """
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [case if case in quick else _exhaustive(case, unpack) for case in cases]


def _exhaustive(case: Any, unpack: bool) -> Any:
    values = case if unpack and isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)
