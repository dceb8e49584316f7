import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.schedules import FlowSchedule

FLOW = FlowSchedule()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_at_zero_and_noise_at_one(dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert torch.equal(FLOW.alpha(ends), torch.tensor([1.0, 0.0], dtype=dtype))
    assert torch.equal(FLOW.sigma(ends), torch.tensor([0.0, 1.0], dtype=dtype))


@settings(max_examples=20)
@given(t=st.floats(1e-3, 1 - 1e-3))
def test_alpha_and_sigma_are_linear_and_give_the_log_snr(t):
    t = torch.tensor([t], dtype=torch.float64)
    assert torch.allclose(FLOW.alpha(t), 1 - t, atol=1e-12)
    assert torch.allclose(FLOW.sigma(t), t, atol=1e-12)
    assert torch.allclose(FLOW.log_snr(t), 2 * (FLOW.alpha(t) / FLOW.sigma(t)).log(), atol=1e-9)


def test_the_grid_goes_from_noise_to_data_evenly():
    assert FLOW.grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
