"""Settings declare their types and bounds, and one place checks them."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest

from redraft.settings import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Seed,
    Settings,
    Within,
    declared_bounds,
)


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    section: ClassVar[str] = "train"
    count: Count = 1
    limit: Count | None = None
    index: Natural = 0
    rate: Positive = 0.5
    decay: NonNegative = 0.0
    share: Probability = 1.0
    part: Fraction = 0.0
    seed: Seed = 0
    angle: Annotated[float, Within("(0, 4)")] | None = None
    is_on: bool = False
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()


def test_values_at_their_bounds_are_taken_and_a_whole_number_may_stand_for_a_float():
    Example(count=2**20, limit=1, index=0, rate=1, decay=0, share=0, part=0.99, seed=2**32 - 1, angle=3.9, names=("x",))
    Example(count=np.int64(3), rate=np.float32(0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "train.count must lie in [1, 1048576]; got 0."),
        ({"count": 2**20 + 1}, "train.count must lie in [1, 1048576]; got 1048577."),
        ({"limit": 0}, "train.limit must lie in [1, 1048576]; got 0."),
        ({"index": -1}, "train.index must be at least 0; got -1."),
        ({"rate": 0.0}, "train.rate must be positive and finite; got 0.0."),
        ({"decay": -0.1}, "train.decay must be at least 0; got -0.1."),
        ({"share": 1.1}, "train.share must lie in [0, 1]; got 1.1."),
        ({"part": 1.0}, "train.part must lie in [0, 1); got 1.0."),
        ({"seed": -1}, "train.seed must lie in [0, 4294967295]; got -1."),
        ({"angle": 4}, "train.angle must lie in (0, 4); got 4."),
        ({"rate": math.nan}, "train.rate must be a finite number; got nan."),
        ({"rate": np.float32("inf")}, "train.rate must be a finite number; got inf."),
        ({"count": 2.0}, "train.count must be of type int; got 2.0."),
        ({"count": True}, "train.count must be of type int; got True."),
        ({"limit": "2"}, "train.limit must be one of int, None; got '2'."),
        ({"share": "1"}, "train.share must be of type float; got '1'."),
        ({"is_on": "no"}, "train.is_on must be of type bool; got 'no'."),
        ({"kind": "c"}, "train.kind must be one of 'a', 'b'; got 'c'."),
        ({"names": ("x", 1)}, "train.names must be of type tuple; got ('x', 1)."),
    ],
)
def test_another_value_is_refused_in_one_line_that_names_the_setting(given, message):
    with pytest.raises(ValueError) as error:
        Example(**given)
    assert str(error.value) == message


def test_without_a_section_the_name_stands_alone():
    @dataclass(frozen=True, kw_only=True)
    class Plain(Settings):
        steps: Count = 1

    with pytest.raises(ValueError, match="^steps must lie in"):
        Plain(steps=0)


def test_the_bounds_of_an_annotation_can_be_read():
    assert [str(bound) for bound in declared_bounds(Count | None)] == ["lie in [1, 1048576]"]
    assert declared_bounds(int) == []
