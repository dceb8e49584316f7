"""Policies: small frozen dataclasses that say where, how sure, how many, what to revise, and when to stop.

None of them calls a model. Each kind is a Protocol with one method; one's own is as good as those here.
"""

from redraft.sampling.policies.action import Action, Kind
from redraft.sampling.policies.anneal import Anneal, LinearAnneal
from redraft.sampling.policies.candidates import Candidates, Draws, Window
from redraft.sampling.policies.frontier import Blocks, Frontier, GridBlocks, WholeCanvas
from redraft.sampling.policies.revise import Posterior, Remasking, Renoise, Rerank, Revise, TokenEdit
from redraft.sampling.policies.score import (
    Confidence,
    LeftToRight,
    Margin,
    NegativeEntropy,
    Perturbed,
    Random,
    Score,
    WithPositionPrior,
)
from redraft.sampling.policies.stop import EndOfSequence, Filled, Stop, StopStrings
from redraft.sampling.policies.unmask import (
    AtTheEnd,
    Bernoulli,
    EntropyBound,
    Factor,
    FirstHitting,
    Quota,
    Sequential,
    Threshold,
    TopK,
    Unmask,
)

__all__ = [
    "Action",
    "Anneal",
    "AtTheEnd",
    "Bernoulli",
    "Blocks",
    "Candidates",
    "Confidence",
    "Draws",
    "EndOfSequence",
    "EntropyBound",
    "Factor",
    "Filled",
    "FirstHitting",
    "Frontier",
    "GridBlocks",
    "Kind",
    "LeftToRight",
    "LinearAnneal",
    "Margin",
    "NegativeEntropy",
    "Perturbed",
    "Posterior",
    "Quota",
    "Random",
    "Remasking",
    "Renoise",
    "Rerank",
    "Revise",
    "Score",
    "Sequential",
    "Stop",
    "StopStrings",
    "Threshold",
    "TokenEdit",
    "TopK",
    "Unmask",
    "WholeCanvas",
    "Window",
    "WithPositionPrior",
]
