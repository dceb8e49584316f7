"""Counter-based random numbers: a draw is a pure function of its key, never of what was drawn before it.

A row keyed by (seed, step, position) draws the same noise whatever else is in its batch, however it is padded,
on any device and any number of processes. Nothing has to be saved to resume a run.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(state: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Scramble 64-bit integers with the finaliser of SplitMix64 (Steele, Lea, Flood: OOPSLA 2014)."""
    state = state + _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def fold(*counters: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """Combine counters (broadcast against each other, order matters) into one 64-bit key."""
    key = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        if isinstance(counter, Tensor):
            key = mix(key.to(counter.device) ^ mix(counter))
        else:
            key = mix(key ^ mix(torch.tensor(counter, dtype=torch.int64, device=key.device)))
    return key


def uniform(*counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Draw from U[0, 1) as float64, one number for each key `fold(*counters)`."""
    return _shift_right(fold(*counters), 11).to(torch.float64) * 2.0**-53


def normal(*counters: Int[Tensor, "..."] | int) -> Float[Tensor, "..."]:
    """Draw from N(0, 1) as float64, one number for each key `fold(*counters)`."""
    drawn: Tensor = torch.special.ndtri(uniform(*counters) + 2.0**-54)  # never at 0, whose quantile is infinite
    return drawn


def _shift_right(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Shift logically; torch's own shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
