from typing import get_args

import pytest
import torch

from redraft.processes.gaussian import GaussianDiffusion, Weighting, times_from_uniform


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_every_position_has_its_own_time():
    process = GaussianDiffusion()
    x_0, eps, t = draw(5, 3, 4), draw(5, 3, 4, seed=1), torch.rand(5, 3, dtype=torch.float64)
    whole = process.corrupt(x_0, t, eps=eps)
    assert torch.allclose(whole, (1 - t[..., None]) * x_0 + t[..., None] * eps)
    assert torch.equal(whole[2:3, 1:2], process.corrupt(x_0[2:3, 1:2], t[2:3, 1:2], eps=eps[2:3, 1:2]))
    assert torch.allclose(process.corrupt(x_0, torch.zeros_like(t), eps=eps), x_0)


def test_weights_of_the_squared_error_of_x_0():
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    x_0, wrong = draw(9, 4), draw(9, 4, seed=2)
    error = (wrong - x_0).square().mean(-1)
    expected = {"unit": error, "inverse-t": error / t, "elbo": error * (1 - t) / t**3}
    for weighting in get_args(Weighting):
        loss = GaussianDiffusion(weighting=weighting).loss(wrong, x_0, t)
        assert torch.allclose(loss.double(), expected[weighting], rtol=1e-5), weighting
        assert GaussianDiffusion(weighting=weighting).loss(x_0, x_0, t).abs().max() == 0


def test_weights_stay_finite_at_both_ends_and_do_not_grow_below_the_smallest_t():
    ends = torch.tensor([0.0, 1e-6, 1.0])
    for weighting in get_args(Weighting):
        assert GaussianDiffusion(weighting=weighting).weight(ends).isfinite().all()
    process = GaussianDiffusion(smallest_t=0.2)
    assert torch.equal(process.weight(torch.tensor([0.0, 0.1])), process.weight(torch.tensor([0.2, 0.2])))


def test_time_densities_keep_their_shape():
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logits = torch.logit(times_from_uniform(u, density="logit-normal"))
    assert abs(float(logits.mean()) - 1.0) < 1e-3
    assert abs(float(logits.std()) - 1.0) < 1e-2
    assert torch.equal(times_from_uniform(u, density="uniform"), u)


def test_an_unknown_weighting_is_told():
    with pytest.raises(ValueError, match="unknown weighting 'snr'.*inverse-t, unit, elbo"):
        GaussianDiffusion(weighting="snr")
