"""The two-copy mask against separate forwards, gradients, and what may not leak."""

from dataclasses import replace

import pytest
import torch
from tiny_thinker import tiny_batch, tiny_thinker

from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.objective import ThoughtObjective, _Draws, _joint, _two_copies
from redraft.latent.rollout import Known, RolloutObjective
from redraft.latent.sequence import Latents, Part, Tokens
from redraft.layouts import two_copy_mask
from redraft.randomness import normal
from redraft.training.latent import alike

CERTAIN = ThoughtObjective(drop_prompt=0.0, context_noise=0.0, joint=0.0, self_conditioning=0.0)


def run(thinker, batch, objective=CERTAIN):
    draws = _Draws(seed=0, step=0, batch=batch, part=Part.whole(batch))
    sequence, noised = _two_copies(objective, thinker.denoiser, thinker.denoiser.config.process, batch, draws)
    with torch.no_grad():
        return sequence, noised, thinker.denoiser(sequence.tokens, sequence.latents, sequence.mask)


def test_the_mask_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    block, copy = torch.randint(0, 4, (3, 12)), torch.randint(0, 3, (3, 12))
    is_valid = torch.rand(3, 12) < 0.8
    mask = two_copy_mask(block, copy, is_valid=is_valid)
    for b in range(3):
        for q in range(12):
            for k in range(12):
                own = block[b, q] == block[b, k] and copy[b, q] == copy[b, k]
                earlier = copy[b, k] == 0 and block[b, k] < block[b, q]
                assert mask[b, 0, q, k] == (q == k or bool(is_valid[b, k] and (own or earlier)))


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("answer", ["autoregressive", "masked"])
def test_one_pass_equals_separate_forwards_of_every_block_and_of_the_answer(answer, copies):
    """Each piece alone: [prompt | clean blocks before it | itself], row by row, without padding."""
    thinker = tiny_thinker(answer=answer)
    batch, config = tiny_batch(thinker), thinker.denoiser.config
    size, count = config.num_latents, config.max_blocks
    sequence, _, hidden = run(thinker, batch, replace(CERTAIN, copies=copies))
    for row in range(len(batch.prompt)):
        length, real = int(batch.is_prompt[row].sum()), int(batch.num_blocks[row])
        for copy in range(1 + copies):
            for block in range(real):
                kept = list(range(block * size)) if copy else []
                start = (copy * count + block) * size
                own = list(range(start, start + size)) if copy else list(range((block + 1) * size))
                alone = forward_alone(
                    thinker, sequence, row, length, kept + own, block_causal=len(kept) // size or None
                )
                whole = hidden.latents[row, own[-size:]]
                assert torch.allclose(alone.latents[0, -size:], whole, atol=1e-9), (row, copy, block)
        alone = forward_alone(thinker, sequence, row, length, list(range(real * size)), with_answer=True)
        assert torch.allclose(alone.tokens[0, length:], hidden.tokens[row, batch.prompt.shape[1] :], atol=1e-9)


def forward_alone(thinker, sequence, row, length, latents, *, with_answer=False, block_causal=None):
    """Run some latents of one row behind its prompt, with a mask written down by hand."""
    config = thinker.denoiser.config
    width, size = sequence.tokens.ids.shape[1], config.num_latents
    kept = list(range(length)) + (list(range(config.prompt_tokens, width)) if with_answer else [])

    def take(kind, columns, *names):
        return {name: getattr(kind, name)[row : row + 1, columns] for name in names}

    tokens = Tokens(**take(sequence.tokens, kept, "ids", "positions", "is_null"))
    chosen = Latents(**take(sequence.latents, latents, "z_t", "x_0", "t", "positions"))
    answers, total = len(kept) - length, len(kept) + len(latents)
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:, :length] = True  # everything sees the prompt
    for q in range(len(latents)):
        for k in range(len(latents)):
            mask[len(kept) + q, len(kept) + k] = k // size <= q // size
    mask[length : len(kept), len(kept) :] = True  # the answer sees all thoughts
    order = torch.ones(answers, answers, dtype=torch.bool)
    mask[length : len(kept), length : len(kept)] = order.tril() if config.answer == "autoregressive" else order
    with torch.no_grad():
        return thinker.denoiser(tokens, chosen, mask[None, None])


def test_a_noisy_block_does_not_see_its_own_clean_copy_or_what_comes_after():
    thinker = tiny_thinker()
    batch = replace(tiny_batch(thinker), num_blocks=torch.full((6,), 3))
    size = thinker.denoiser.config.num_latents
    sequence, _, hidden = run(thinker, batch)
    changed = sequence.latents.z_t.clone()
    changed[:, size : 3 * size] += 1.0  # clean blocks 2 and 3
    with torch.no_grad():
        other = thinker.denoiser(sequence.tokens, replace(sequence.latents, z_t=changed), sequence.mask)
    moved = (other.latents - hidden.latents).abs().amax(-1)[:, 3 * size :]
    assert moved[:, : 2 * size].max() == 0  # noisy blocks 1 and 2
    assert moved[:, 2 * size :].min() > 0  # noisy block 3 sees clean block 2


def test_noisy_copies_share_the_positions_of_their_clean_ones():
    thinker = tiny_thinker()
    sequence, _, _ = run(thinker, tiny_batch(thinker), replace(CERTAIN, copies=2))
    positions = sequence.latents.positions.unflatten(1, (3, -1))
    assert (positions == positions[:, :1]).all()


def test_revision_sees_all_blocks_and_one_is_noisy():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    draws = _Draws(seed=0, step=0, batch=batch, part=Part.whole(batch))
    sequence, noised = _joint(CERTAIN, thinker.denoiser, thinker.denoiser.config.process, batch, draws)
    assert (sequence.is_noisy.sum(1) == thinker.denoiser.config.num_latents).all()
    assert (sequence.is_noisy <= sequence.is_valid[:, 5:]).all()
    assert torch.equal(noised.z_t[~sequence.is_noisy], batch.blocks.flatten(1, 2)[~sequence.is_noisy])


@pytest.mark.parametrize("answer", ["autoregressive", "masked"])
def test_every_gradient_reaches_what_it_should(answer):
    thinker = tiny_thinker(answer=answer)
    batch, model = tiny_batch(thinker), thinker.denoiser
    reached = {}
    for name in ("flow", "stop", "answer"):
        model.zero_grad()
        losses = replace(CERTAIN, drop_prompt=0.5)(model, batch, seed=0, step=0)
        losses[name].backward()
        reached[name] = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    heads = {"out.weight", "out.bias", "stop.weight", "stop.bias"}
    body = {name for name, _ in model.named_parameters()} - heads
    assert reached["flow"] == body | {"out.weight", "out.bias"}
    assert reached["stop"] == body | {"stop.weight", "stop.bias"}
    assert reached["answer"] == body


def test_self_conditioning_feeds_the_estimate_of_a_first_pass_without_its_gradient():
    thinker = tiny_thinker()
    batch, model = tiny_batch(thinker), thinker.denoiser
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append((inputs[1], output.latents)))
    plain = CERTAIN(model, batch, seed=0, step=0)
    conditioned = replace(CERTAIN, self_conditioning=1.0)(model, batch, seed=0, step=0)
    (_, _), (first, estimate), (second, _) = passes
    is_noisy = first.t > 0
    guess = model.config.process.predict_x_0(model.out(estimate), first.z_t, first.t)
    assert torch.equal(second.x_0[is_noisy], guess[is_noisy])
    assert torch.equal(second.x_0[~is_noisy], first.x_0[~is_noisy])
    assert not estimate.requires_grad
    assert not second.x_0.requires_grad
    assert not torch.allclose(plain["flow"], conditioned["flow"])
    assert torch.allclose(plain["stop"], conditioned["stop"])  # clean blocks are told nothing


def test_the_stop_loss_asks_of_every_real_block_whether_it_is_the_last():
    thinker = tiny_thinker()
    batch, size = tiny_batch(thinker), thinker.denoiser.config.num_latents
    _, _, hidden = run(thinker, batch)
    nats = []
    for row, count in enumerate(batch.num_blocks.tolist()):
        for block in range(1, count + 1):
            states = hidden.latents[row : row + 1, (block - 1) * size : block * size]
            share = thinker.denoiser.stop_logit(states).sigmoid()[0]
            nats.append(-(share if block == count else 1 - share).log())
    loss = CERTAIN(thinker.denoiser, batch, seed=0, step=0)["stop"]
    assert torch.allclose(loss.double(), torch.stack(nats).mean(), rtol=1e-5)


def test_the_clean_context_of_half_of_the_rows_is_noised_a_little_and_does_not_say_so():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker, rows=200)
    sequence, noised, _ = run(thinker, batch, replace(CERTAIN, context_noise=0.1))
    clean, t = batch.blocks.flatten(1, 2), noised.t[:, : batch.blocks[0, :, :, 0].numel()]
    assert (sequence.latents.t[:, : t.shape[1]] == 0).all()
    given = sequence.latents.z_t[:, : t.shape[1]]
    assert torch.equal(given, sequence.latents.x_0[:, : t.shape[1]])
    moved = (given - clean).abs().amax((1, 2))
    assert 70 < int((moved > 0).sum()) < 130
    assert torch.equal(moved > 0, t[:, 0] > 0)
    assert 0.08 < t.max() <= 0.1
    eps = noised.eps[:, : t.shape[1]]
    assert torch.allclose(given, (1 - t[..., None]) * clean + t[..., None] * eps)  # flow


def test_the_times_of_every_block_are_spread_evenly_over_the_rows():
    thinker = tiny_thinker()
    batch, size = tiny_batch(thinker, rows=50), thinker.denoiser.config.num_latents
    _, noised, _ = run(thinker, batch, replace(CERTAIN, times="uniform"))
    t = noised.t[:, 3 * size :: size]  # of the noisy blocks
    assert t.shape == (50, 3)
    assert torch.allclose(t.sort(dim=0).values.diff(dim=0), torch.tensor(1 / 50).double(), atol=1e-5)
    assert not torch.equal(t[:, 0].argsort(), t[:, 1].argsort())


def test_rows_draw_the_same_noise_whatever_blocks_they_have():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    other = replace(batch, blocks=batch.blocks + 1, num_blocks=4 - batch.num_blocks)
    (_, one, _), (_, two, _) = run(thinker, batch), run(thinker, other)
    assert torch.equal(one.eps, two.eps)
    assert torch.equal(one.t, two.t)
    first, again, later = (CERTAIN(thinker.denoiser, batch, seed=0, step=step)["loss"] for step in (3, 3, 4))
    assert first == again != later


@pytest.mark.parametrize("answer", ["autoregressive", "masked"])
@pytest.mark.parametrize("passes", [True, False])
def test_rollout_sends_the_answers_gradient_through_the_thoughts_if_told_to(answer, passes):
    thinker = tiny_thinker(answer=answer)
    objective = RolloutObjective(steps=2, thought_weight=0.0, answer_gradient=passes)
    losses = objective(thinker.denoiser, tiny_batch(thinker), seed=0, step=0)
    losses["loss"].backward()
    grad = thinker.denoiser.out.weight.grad  # only the thoughts use this head
    assert (grad is not None and grad.abs().sum() > 0) == passes


def test_rollout_teaches_every_step_of_its_own_trajectory():
    """The flow loss by hand: the x_0 error of each estimate, weighed at its own noisy latents."""
    thinker = tiny_thinker()
    model, batch = thinker.denoiser, tiny_batch(thinker)
    objective = RolloutObjective(steps=3, weight=0.0)
    losses = objective(model, batch, seed=0, step=0)
    assert set(losses) == {"own", "loss"}
    rows, count, size, dim = batch.blocks.shape
    index, own, total = torch.arange(rows)[:, None], batch.blocks[:, :0], 0.0
    for block in range(count):
        z = normal(0, 0, 11, index, block + 1, torch.arange(size * dim)).to(own).view(rows, size, dim)
        for estimate, t in zip(objective._denoise(model, batch, own, z), (1, 2 / 3, 1 / 3), strict=True):
            error = (estimate.x_0 - batch.blocks[:, block]).square().mean(-1) * (block < batch.num_blocks)[:, None]
            total = total + error.sum() / max(t, 0.2)
            x_0 = estimate.x_0.detach()
        own = torch.cat([own, x_0[:, None]], dim=1)
    expected = total / (batch.num_blocks.sum() * size * 3)
    assert torch.allclose(losses["own"].double(), expected.double(), rtol=1e-5)
    losses["loss"].backward()
    assert model.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weighting", ["inverse-t", "elbo", "min-snr"])
@pytest.mark.parametrize("parametrization", ["x0", "eps", "v", "flow"])
def test_rollout_is_finite_whatever_is_predicted_and_however_it_is_weighed(parametrization, weighting):
    thinker = tiny_thinker(parametrization=parametrization, weighting=weighting)
    losses = RolloutObjective(steps=2)(thinker.denoiser, tiny_batch(thinker), seed=0, step=0)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_step_without_any_answer_has_a_loss():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    batch = replace(batch, is_answer=torch.zeros_like(batch.is_answer))
    losses = CERTAIN(thinker.denoiser, batch, seed=0, step=0)
    assert losses["answer"] == 0
    assert torch.isfinite(losses["loss"])


def test_rollout_takes_the_nearest_known_train_of_thought_and_its_answer():
    batch = tiny_batch(tiny_thinker())
    rows = len(batch.prompt)
    known = Known(
        blocks=torch.cat([batch.blocks, batch.blocks + 1]),
        num_blocks=batch.num_blocks.repeat(2),
        answer=torch.arange(2 * rows)[:, None].expand(-1, batch.answer.shape[1]),
        is_answer=batch.is_answer.repeat(2, 1),
    )
    own_and_other = torch.stack([torch.arange(rows), torch.arange(rows) + rows], dim=1)
    batch = replace(batch, alike=own_and_other)
    far_beyond_the_end = batch.blocks.clone()
    far_beyond_the_end[torch.arange(batch.blocks.shape[1]) >= batch.num_blocks[:, None]] = 9.0
    assert known.nearest(batch, far_beyond_the_end + 0.2).answer[:, 0].tolist() == list(range(rows))
    found = known.nearest(batch, batch.blocks + 0.8)
    assert found.answer[:, 0].tolist() == list(range(rows, 2 * rows))
    assert torch.equal(found.blocks, batch.blocks + 1)


def test_rollout_estimates_a_block_the_same_whether_or_not_the_row_itself_goes_so_far():
    """The nearest train of thought may be the longer one: its blocks were denoised as they are at sampling."""
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    z = torch.randn(batch.blocks[:, 0].shape, dtype=torch.float64)
    found = [
        RolloutObjective(steps=2)._denoise(thinker.denoiser, row, batch.blocks[:, :2], z)[-1].x_0
        for row in (replace(batch, num_blocks=torch.full_like(batch.num_blocks, n)) for n in (1, 3))
    ]
    assert torch.equal(*found)


def test_rows_of_one_prompt_know_each_other():
    assert alike(["a", "b", "a", "c", "a"]).tolist() == [[0, 2, 4], [1, 1, 1], [2, 4, 0], [3, 3, 3], [4, 0, 2]]
    assert alike(["a"] * 100).shape == (100, 64)  # a table of all pairs would grow with their square


def test_a_model_learns_one_batch_by_heart():
    thinker = tiny_thinker(seed=1)
    model, batch = thinker.denoiser.float(), tiny_batch(thinker)
    batch = replace(batch, blocks=batch.blocks.float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    seen = []
    for step in range(25):
        losses = CERTAIN(model, batch, seed=0, step=step)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: float(loss.detach()) for name, loss in losses.items()})
    for name in ("flow", "answer", "stop"):
        assert sum(s[name] for s in seen[-5:]) < 0.8 * sum(s[name] for s in seen[:5]), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LatentDenoiser(LatentDenoiserConfig(answer="greedy")), "unknown answer decoder 'greedy'"),
        (lambda: LatentDenoiser(LatentDenoiserConfig(hidden_size=30)), "multiple of 2 num_heads; got 30 and 4"),
        (lambda: ThoughtObjective(copies=0), "copies must be at least 1"),
        (lambda: ThoughtObjective(drop_prompt=2.0), "drop_prompt must be in"),
        (lambda: RolloutObjective(steps=0), "rollout.steps must be at least 1"),
        (lambda: RolloutObjective(weight=0, thought_weight=0), "rollout.weight and rollout.thought_weight must be"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
