"""A finished run says in words what its numbers mean."""

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from redraft.likelihood.problem import Estimate
from redraft.training.verdict import RunResult, announce, divergence, weight_norm, worse_than_chance

WORSE = "the model is worse than guessing each token by its frequency"


def estimate(nats):
    return Estimate(nats_per_token=nats, standard_error=0.01, bits_per_byte=2.0)


@pytest.mark.parametrize(
    ("nats", "compared", "is_worse"),
    [(5.3, "the NELBO is 6.0 % above", True), (5.0, "the NELBO is 0.0 % above", True), (4.5, "10.0 % below", False)],
)
def test_a_loss_above_the_unigram_entropy_is_called_worse_than_guessing_by_frequency(nats, compared, is_worse, capsys):
    outcome = RunResult(
        folder=Path("run[/red]"), steps=1, validation=estimate(nats), unigram_nats=5.0, gzip_bits_per_byte=3
    )
    announce(outcome, Console())
    said = capsys.readouterr().out
    assert compared in said
    assert (WORSE in said) == is_worse
    assert said.endswith("saved to run[/red]\n")


@pytest.mark.parametrize(
    ("losses", "norms", "reason"),
    [
        ([7.0, 6.0, 5.0], (10.0, 12.0), None),
        ([7.0, 6.0, 90.0, 5.0, 6.0], (10.0, 9000.0), None),  # one step of few tokens and a large weight
        ([0.02, 0.3, 0.4], (0.01, 5.0), None),  # small losses and small adapters may multiply
        ([7.0, 6.0, 71.0, 72.0, 73.0, 90.0, 80.0], (10.0, 12.0), "its training loss went from 7 to 73"),
        ([7.0], (10.0, 10001.0), "the norm of its weights went from 10 to 1e+04"),
        ([7.0], (10.0, math.nan), "the norm of its weights went from 10 to nan"),
        ([7.0], (10.0, math.inf), "the norm of its weights went from 10 to inf"),
        ([math.nan], (10.0, 10.0), None),  # the guard has skipped that step and told of it
    ],
)
def test_a_run_diverged_where_its_weights_exploded_or_its_loss_rose_for_good(losses, norms, reason):
    assert divergence([{"loss": loss} for loss in losses], norm_before=norms[0], norm=norms[1]) == reason


@pytest.mark.parametrize(("nats", "is_lost"), [(10.9, False), (11.1, True), (math.nan, True), (math.inf, True)])
def test_a_held_out_loss_twice_that_of_guessing_is_a_divergence(nats, is_lost):
    assert (worse_than_chance(estimate(nats), chance=5.5, measure="NELBO") is not None) == is_lost


def test_the_norm_is_that_of_the_trained_weights():
    model = torch.nn.Linear(3, 1)
    torch.nn.init.constant_(model.weight, 2.0)
    torch.nn.init.constant_(model.bias, 2.0)
    assert weight_norm(model) == pytest.approx(4.0)
    model.bias.requires_grad_(False)
    assert weight_norm(model) == pytest.approx(12**0.5)
