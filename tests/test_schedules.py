import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redraft.schedules import SCHEDULES, Geometric, Polynomial, schedule_from_name, stratified_times, weight

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@every_schedule
def test_alpha_falls_from_one_to_zero(name):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = schedule_from_name(name).alpha(t)
    assert torch.allclose(alpha[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)
    assert (alpha.diff() < 0).all()


@every_schedule
@given(t=st.floats(0.01, 0.99))
def test_derivative_is_autograds(name, t):
    t = torch.tensor([t], dtype=torch.float64, requires_grad=True)
    schedule = schedule_from_name(name)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    assert torch.allclose(schedule.derivative(t.detach()), slope, rtol=1e-9)


def test_weight_of_the_linear_schedule_is_one_over_t():
    t = torch.tensor([0.1, 0.5, 1.0])
    assert torch.allclose(weight(schedule_from_name("linear"), t), 1 / t)


def test_stratified_times_are_one_per_stratum():
    t = stratified_times(torch.arange(10.0), total=10, offset=torch.tensor(0.3))
    assert torch.equal((t * 10).ceil(), torch.arange(1.0, 11.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedule_from_name("cosin"), "unknown schedule 'cosin'.*Did you mean 'cosine'"),
        (lambda: Polynomial(power=0), "power must be positive; got 0"),
        (lambda: Geometric(sigma_min=3.0, sigma_max=2.0), "sigma_min must lie in"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
