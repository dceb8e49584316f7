import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.schedules import GAUSSIAN_SCHEDULES, GaussianSchedule, gaussian_schedule

every_schedule = pytest.mark.parametrize("name", GAUSSIAN_SCHEDULES)
inside = st.floats(1e-3, 1 - 1e-3)


def double(value):
    return torch.tensor([value], dtype=torch.float64)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_at_zero_and_noise_at_one(name, dtype):
    schedule, ends = gaussian_schedule(name), torch.tensor([0.0, 1.0], dtype=dtype)
    left = 0.0066 if name == "linear-beta" else 0.0  # DDPM's schedule keeps a little of the data
    assert torch.allclose(schedule.alpha(ends), torch.tensor([1.0, left], dtype=dtype), atol=1e-3)
    assert torch.allclose(schedule.sigma(ends), torch.tensor([0.0, 1.0], dtype=dtype), atol=1e-3)


@every_schedule
@settings(max_examples=20)
@given(t=inside, shift=st.floats(0.1, 10))
def test_log_snr_is_two_log_alpha_over_sigma(name, t, shift):
    schedule, t = gaussian_schedule(name, shift=shift), double(t)
    assert torch.allclose(schedule.log_snr(t), 2 * (schedule.alpha(t) / schedule.sigma(t)).log(), atol=1e-9)


@every_schedule
@settings(max_examples=20)
@given(t=inside, shift=st.floats(0.1, 10))
def test_inverse_undoes_log_snr(name, t, shift):
    schedule = gaussian_schedule(name, shift=shift)
    assert torch.allclose(schedule.inverse(schedule.log_snr(double(t))), double(t), atol=1e-9)


@every_schedule
@settings(max_examples=20)
@given(t=inside)
def test_derivative_is_autograds_and_falls(name, t):
    schedule, t = gaussian_schedule(name), double(t).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    assert torch.allclose(schedule.log_snr_derivative(t.detach()), slope, rtol=1e-7)
    assert slope < 0


@every_schedule
@settings(max_examples=20)
@given(t=inside)
def test_paths_are_related_by_the_change_of_variables(name, t):
    """z_flow = z_vp / (alpha_vp + sigma_vp) at equal log-SNR, to 1e-6."""
    vp, flow = GaussianSchedule(curve=name, path="vp"), GaussianSchedule(curve=name, path="flow")
    t = double(t)
    total = vp.alpha(t) + vp.sigma(t)
    assert torch.allclose(vp.alpha(t) / total, flow.alpha(t), atol=1e-6)
    assert torch.allclose(vp.sigma(t) / total, flow.sigma(t), atol=1e-6)
    assert torch.allclose(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t))
    assert torch.allclose(flow.alpha(t) + flow.sigma(t), torch.ones_like(t))


@settings(max_examples=20)
@given(t=inside, s=st.floats(0.2, 5))
def test_shift_covers_the_published_knobs(t, s):
    t = double(t)
    shifted = s * t / (1 + (s - 1) * t)  # SD3's timestep shift
    assert torch.allclose(gaussian_schedule("flow", shift=1 / s).sigma(t), shifted)
    tan = 1 / (1 + s**2 * torch.tan(math.pi / 2 * t) ** 2)  # tan-d of TEncDM: alpha squared
    assert torch.allclose(gaussian_schedule("cosine", shift=1 / s).alpha(t) ** 2, tan)
    noisier = (s * t) / (1 - t + s * t)  # ELF's noise scale, in flow time
    assert torch.allclose(gaussian_schedule("flow", shift=1 / s).sigma(t), noisier)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gaussian_schedule("cosin"), "unknown Gaussian schedule 'cosin'.*Did you mean 'cosine'"),
        (lambda: gaussian_schedule("flow", shift=0.0), "shift must be positive and finite; got 0"),
        (lambda: GaussianSchedule(path="ve"), "unknown path 've'; known are vp, flow"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
