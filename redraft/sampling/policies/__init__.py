"""Policies: callables that open blocks, score proposals, commit, revise and stop. None of them calls a model.

A policy with settings is a frozen dataclass, one without is a function. Your own works the same way. All names of the
modules below are names of this package, so that a new policy is added in one file.
"""

from redraft.sampling.policies.candidates import *  # noqa: F403
from redraft.sampling.policies.frontier import *  # noqa: F403
from redraft.sampling.policies.revise import *  # noqa: F403
from redraft.sampling.policies.score import *  # noqa: F403
from redraft.sampling.policies.stop import *  # noqa: F403
from redraft.sampling.policies.unmask import *  # noqa: F403
