"""Recipes: functions that return the whole configuration of a run. The first line of the docstring is the help."""

from collections.abc import Callable

from redraft.recipes.stdlib import stdlib_demo, stdlib_small, stdlib_tiny
from redraft.training.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "stdlib-tiny": stdlib_tiny,
    "stdlib-demo": stdlib_demo,
    "stdlib-small": stdlib_small,
}
