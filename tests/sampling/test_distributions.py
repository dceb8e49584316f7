"""With the exact conditionals of a known joint distribution, a sampler draws from that distribution."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings
from redraft.sampling import policies as p
from redraft.sampling.batch import denoise
from redraft.sampling.canvas import build_canvas
from redraft.sampling.sampler import Sampler

N, LENGTH, ROWS, MASK = 3, 3, 20_000, 3
STATES = torch.cartesian_prod(*[torch.arange(N)] * LENGTH)  # (27, 3)
JOINT = (2 * torch.randn(len(STATES), generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(0)


CANVASES = torch.cartesian_prod(*[torch.arange(N + 1)] * LENGTH)  # every canvas there is, masks and all


def exact_logits(alpha=None):
    """Predict each token of each canvas by Bayes' rule, from masked or from uniformly noised neighbours; (64, L, V)."""
    same = (CANVASES[:, None, :] == STATES).double()
    if alpha is None:
        reach = torch.where(CANVASES[:, None, :] == MASK, 1.0, same)
    else:
        reach = alpha * same + (1 - alpha) / N
    weights = torch.zeros(len(CANVASES), LENGTH, N + (alpha is None), dtype=torch.float64)
    for i in range(LENGTH):
        seen = [j for j in range(LENGTH) if j != i or alpha is None]  # under uniform noise: all but itself (UDLM)
        likelihood = reach[:, :, seen].prod(dim=2) * JOINT
        for token in range(N):
            weights[:, i, token] = likelihood[:, STATES[:, i] == token].sum(dim=1)
    return weights.log().float()


@dataclass(frozen=True, kw_only=True)
class Exact(Denoiser):
    """Looks its predictions up: one table, or one for each forward."""

    tables: tuple[torch.Tensor, ...]
    calls: list[int]

    def __call__(self, query):
        table = self.tables[min(len(self.calls), len(self.tables) - 1)]
        self.calls.append(1)
        base = torch.tensor([(N + 1) ** 2, N + 1, 1])
        return table[query.input_ids @ base].flatten(0, 1)[query.where]


def denoiser(alphas=None):
    config = SimpleNamespace(vocab_size=N if alphas else N + 1)
    config.get_text_config = lambda: config
    tables = tuple(map(exact_logits, alphas)) if alphas else (exact_logits(),)
    return Exact(SimpleNamespace(config=config), DiffusionSettings(mask_token_id=MASK), tables=tables, calls=[])


def distance(model, **chosen):
    """Total variation between the joint and what the loop draws."""
    canvas = build_canvas([torch.zeros(LENGTH).long()] * ROWS, [torch.ones(LENGTH) > 0] * ROWS, noise_token_id=MASK)
    final = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    sampler = Sampler(temperature=1.0, **chosen)
    for step in denoise(model, canvas, sampler, row_keys=torch.arange(ROWS)):
        final[step.rows] = step.canvas.tokens
    drawn = torch.bincount(final @ torch.tensor([9, 3, 1]), minlength=len(STATES)) / ROWS
    return 0.5 * (drawn - JOINT).abs().sum().item()


@pytest.mark.parametrize(
    "chosen",
    [
        {"steps": 64, "unmask": p.Bernoulli()},
        {"steps": 3, "unmask": p.TopK(), "score": lambda candidates: -candidates.window.positions.float()},
        {"steps": 3, "unmask": p.TopK(), "score": p.random_order},
    ],
    ids=["ancestral", "left to right", "first hitting"],
)
def test_masked_samplers_draw_from_the_joint(chosen):
    assert distance(denoiser(), **chosen) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("both", [p.Remasking(kind="cap", eta=0.1), p.Remasking(kind="rescale", eta=0.2)])
def test_remasking_draws_from_the_joint_as_the_steps_grow(both):
    few, many = (distance(denoiser(), steps=steps, unmask=both.unmask, revise=both) for steps in (4, 64))
    assert many < 0.025 < few


def test_committing_all_at_once_does_not():
    assert distance(denoiser(), steps=1) > 0.1


@pytest.mark.slow
def test_the_error_of_parallel_commits_falls_with_the_steps():
    errors = [distance(denoiser(), steps=steps, unmask=p.Bernoulli()) for steps in (1, 2, 4, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.3 * errors[0]


@pytest.mark.slow
def test_uniform_noise_draws_from_the_joint():
    steps = 64
    model = denoiser([k / steps for k in range(steps)])
    posterior = p.Posterior(has_greedy_tail=False)
    assert distance(model, steps=steps, noise="uniform", unmask=p.at_the_end, revise=posterior) < 0.02


def test_remasking_keeps_the_share_of_noise_that_the_schedule_says():
    both = p.Remasking(kind="rescale", eta=0.5)
    canvas = build_canvas([torch.zeros(LENGTH).long()] * ROWS, [torch.ones(LENGTH) > 0] * ROWS, noise_token_id=MASK)
    sampler = Sampler(steps=8, temperature=1.0, unmask=both.unmask, revise=both)
    shares = [
        step.canvas.is_noise.double().mean().item()
        for step in denoise(denoiser(), canvas, sampler, row_keys=torch.arange(ROWS))
        if len(step.rows) == ROWS
    ]
    for k, share in enumerate(shares):
        assert share == pytest.approx(1 - (k + 1) / 8, abs=0.015)
