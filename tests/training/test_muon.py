"""Muon beside AdamW: which parameters, the published step, skipped steps, resume."""

import copy

import pytest
import torch
from rich.console import Console
from torch import nn

from redraft.training.muon import Muon, MuonAdamW, layer_matrices

QUIET = Console(quiet=True)


def small_model(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Module()
    model.embed, model.head = nn.Embedding(7, 4), nn.Linear(4, 7)
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 4)) for _ in range(2))
    return model


def optimizer_of(model: nn.Module, *, lr: float = 0.1) -> MuonAdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return MuonAdamW(torch.optim.AdamW(groups, lr=lr, fused=True), layer_matrices(model))


def set_gradients(model: nn.Module, *, seed: int, first: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    if first is not None:
        for p in model.parameters():
            p.grad.view(-1)[0] = first


def test_the_layers_matrices_alone_go_to_muon():
    model = small_model()
    assert [tuple(p.shape) for p in layer_matrices(model)] == 2 * [(6, 4), (4, 6)]
    optimizer = optimizer_of(model)
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    model.layers[0][0].weight.requires_grad_(False)
    assert len(layer_matrices(model)) == 3
    with pytest.raises(ValueError, match="found no matrix"):
        MuonAdamW(torch.optim.AdamW(model.parameters()), [])


def test_a_step_is_the_polar_factor_scaled_to_adamw():
    """2502.16982, equation 4: 0.2 sqrt(max(rows, columns)) U V^T of the gradient's U S V^T, which Muon approximates."""
    model = small_model()
    weight = model.layers[0][0].weight
    before, optimizer = weight.detach().clone(), optimizer_of(model)
    set_gradients(model, seed=1)
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    optimizer.step()
    update = (before * (1 - 0.1 * 0.1) - weight.detach()) / 0.1 / (0.2 * 6**0.5)
    singular = torch.linalg.svdvals(update)
    assert ((singular > 0.6) & (singular < 1.3)).all()  # five iterations of Newton-Schulz come this near
    assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 2])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(value, when):
    model = small_model()
    optimizer = optimizer_of(model)
    for step in range(when):
        set_gradients(model, seed=step)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
    weights, momenta = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.muon.state_dict()["state"])
    set_gradients(model, seed=9, first=value)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    for number, state in optimizer.muon.state_dict()["state"].items():
        before = momenta.get(number, {}).get("momentum_buffer", torch.zeros(()))
        assert torch.equal(state["momentum_buffer"], before.expand_as(state["momentum_buffer"]))


def test_a_verdict_of_zero_is_the_plain_step_and_a_loaded_state_goes_on_alike():
    plain, judged, resumed = (small_model() for _ in range(3))
    optimizers = [optimizer_of(model) for model in (plain, judged)]
    for step in range(4):
        for model, optimizer, verdict in zip((plain, judged), optimizers, (None, torch.tensor(0.0)), strict=True):
            set_gradients(model, seed=step)
            optimizer.found_inf = verdict
            optimizer.step()
        if step == 1:
            resumed.load_state_dict(judged.state_dict())
            saved = copy.deepcopy(optimizers[1].state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(saved)
    for step in (2, 3):
        set_gradients(resumed, seed=step)
        again.step()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, judged.state_dict()[name])
        assert torch.equal(weight, resumed.state_dict()[name])


def test_steps_are_those_of_torchs_muon():
    ours, theirs = (nn.ModuleList([nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 16)]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    matrices = [[layer.weight for layer in model] for model in (ours, theirs)]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = (
        Muon(matrices[0], **settings),
        torch.optim.Muon(matrices[1], **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(3):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    for mine, its in zip(*matrices, strict=True):
        assert (mine - its).abs().max() < 2e-3  # its iterations are in bfloat16; a step moves an entry by about 4e-3
        state, reference = (
            optimizer.state[m]["momentum_buffer"] for optimizer, m in zip(optimizers, (mine, its), strict=True)
        )
        assert torch.allclose(state, reference, atol=1e-6)


def test_schedulers_reach_both():
    model = small_model()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in optimizer.muon.param_groups + optimizer.adamw.param_groups} == {0.05}
    optimizer.load_state_dict(optimizer.state_dict())
    set_gradients(model, seed=0)
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for group in optimizer.muon.param_groups + optimizer.adamw.param_groups} == {0.05}
