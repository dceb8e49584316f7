"""The table of processes: each offers what `Process` says, and its preset starts from its noise."""

import pytest
import torch

from redraft.models.settings import DiffusionSettings
from redraft.processes import PROCESSES, process_class
from redraft.processes.noised import Process
from redraft.sampling.config import SamplingConfig
from redraft.sampling.sampler import build_sampler
from redraft.schedules import Linear


@pytest.mark.parametrize("name", PROCESSES)
def test_each_process_offers_what_a_process_must_and_its_presets_start_from_its_noise(name):
    kind = process_class(name)
    process = kind.build(mask_token_id=2, vocab_size=9, schedule=Linear())
    assert isinstance(process, Process)
    u = torch.rand(3, 4, dtype=torch.float64)
    noised = process.corrupt(torch.ones(3, 4, dtype=torch.int64), torch.ones(3, dtype=torch.float64), u=u)
    assert torch.equal(noised.x_t, process.prior(u))
    assert noised.is_target.all()
    assert ((process.prior(u) == 2).all()) == (kind.noise == "mask")
    for settings in ({"preset": kind.default_preset}, kind.varied_sampling):
        config = SamplingConfig(**settings)
        noise = build_sampler(config, DiffusionSettings(mask_token_id=2, process=name)).noise
        assert noise == kind.noise or not settings


def test_an_unknown_process_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown diffusion.process in config.json 'unifrom'.*Did you mean 'uniform'"):
        process_class("unifrom")
