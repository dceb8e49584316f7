"""The two-copy mask against separate forwards, gradients, and what may not leak."""

from dataclasses import replace

import pytest
import torch
from tiny_thinker import tiny_batch, tiny_thinker, whole_step

from redraft.latent.config import ThoughtObjective
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.objective import ForcedLoss, RolloutLoss, nearest
from redraft.latent.sequence import LatentInputs, TokenInputs
from redraft.latent.stages import rows_of_same_prompt
from redraft.layouts import two_copy_mask
from redraft.randomness import normal

CERTAIN = ForcedLoss(drop_prompt=0.0, context_noise=0.0, joint=0.0, self_conditioning=0.0)


def run(thinker, batch, objective=CERTAIN):
    sequence = objective.sequence(thinker.denoiser, batch, whole_step(batch), is_joint=False)
    with torch.no_grad():
        return sequence, thinker.denoiser(*sequence.inputs)


def losses_of(objective, thinker, batch, *, step=0, **more):
    return objective(thinker.denoiser, batch, whole_step(batch, step=step), **more)


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


def test_one_pass_equals_separate_forwards_of_every_block_and_of_the_answer():
    """Each piece alone: [prompt | clean blocks before it | itself], row by row, without padding."""
    thinker = tiny_thinker()
    batch, config = tiny_batch(thinker), thinker.denoiser.config
    size, count = config.num_latents, config.max_blocks
    sequence, hidden = run(thinker, batch)
    for row in range(len(batch.prompt)):
        length, real = int(batch.is_prompt[row].sum()), int(batch.num_blocks[row])
        for copy in range(2):
            for block in range(real):
                before = list(range(block * size)) if copy else []
                start = (copy * count + block) * size
                itself = list(range(start, start + size)) if copy else list(range((block + 1) * size))
                alone = forward_alone(thinker, sequence, row, length, before + itself)
                whole = hidden.latents[row, itself[-size:]]
                assert torch.allclose(alone.latents[0, -size:], whole, atol=1e-9), (row, copy, block)
        alone = forward_alone(thinker, sequence, row, length, list(range(real * size)), with_answer=True)
        assert torch.allclose(alone.tokens[0, length:], hidden.tokens[row, batch.prompt.shape[1] :], atol=1e-9)


def forward_alone(thinker, sequence, row, length, latents, *, with_answer=False):
    """Run some latents of one row behind its prompt, with a mask written down by hand."""
    config = thinker.denoiser.config
    all_tokens, all_latents, _ = sequence.inputs
    width, size = all_tokens.ids.shape[1], config.num_latents
    kept = list(range(length)) + (list(range(config.prompt_tokens, width)) if with_answer else [])

    def take(kind, columns, *names):
        return {name: getattr(kind, name)[row : row + 1, columns] for name in names}

    tokens = TokenInputs(**take(all_tokens, kept, "ids", "positions", "is_null"))
    chosen = LatentInputs(**take(all_latents, latents, "z_t", "x_0", "t", "positions"))
    answers, total = len(kept) - length, len(kept) + len(latents)
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:, :length] = True  # everything sees the prompt
    for q in range(len(latents)):
        for k in range(len(latents)):
            mask[len(kept) + q, len(kept) + k] = k // size <= q // size
    mask[length : len(kept), len(kept) :] = True  # the answer sees all thoughts
    order = torch.ones(answers, answers, dtype=torch.bool)
    mask[length : len(kept), length : len(kept)] = order.tril()
    with torch.no_grad():
        return thinker.denoiser(tokens, chosen, mask[None, None])


def test_a_noisy_block_does_not_see_its_own_clean_copy_or_what_comes_after():
    thinker = tiny_thinker()
    batch = replace(tiny_batch(thinker), num_blocks=torch.full((6,), 3))
    size = thinker.denoiser.config.num_latents
    sequence, hidden = run(thinker, batch)
    tokens, latents, mask = sequence.inputs
    changed = latents.z_t.clone()
    changed[:, size : 3 * size] += 1.0  # clean blocks 2 and 3
    with torch.no_grad():
        other = thinker.denoiser(tokens, replace(latents, z_t=changed), mask)
    moved = (other.latents - hidden.latents).abs().amax(-1)[:, 3 * size :]
    assert moved[:, : 2 * size].max() == 0  # noisy blocks 1 and 2
    assert moved[:, 2 * size :].min() > 0  # noisy block 3 sees clean block 2


def test_noisy_copies_share_the_positions_of_their_clean_ones():
    thinker = tiny_thinker()
    sequence, _ = run(thinker, tiny_batch(thinker))
    clean, noisy = sequence.inputs[1].positions.chunk(2, dim=1)
    assert torch.equal(clean, noisy)


def test_in_a_joint_step_all_blocks_see_each_other_and_one_is_noisy():
    thinker = tiny_thinker()
    batch, size = tiny_batch(thinker), thinker.denoiser.config.num_latents
    sequence = CERTAIN.sequence(thinker.denoiser, batch, whole_step(batch), is_joint=True)
    _, latents, mask = sequence.inputs
    assert (sequence.is_noisy.sum(1) == size).all()
    assert (sequence.is_noisy <= sequence.is_real).all()
    assert torch.equal(latents.z_t[~sequence.is_noisy], batch.blocks.flatten(1, 2)[~sequence.is_noisy])
    assert (mask[:, 0, 5:, 5:] >= sequence.is_real[:, None]).all()


def test_every_gradient_reaches_what_it_should():
    thinker = tiny_thinker()
    batch, model = tiny_batch(thinker), thinker.denoiser
    reached = {}
    for name in ("flow", "stop", "answer"):
        model.zero_grad()
        losses = losses_of(replace(CERTAIN, drop_prompt=0.5), thinker, batch)
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
    plain = losses_of(CERTAIN, thinker, batch)
    conditioned = losses_of(replace(CERTAIN, self_conditioning=1.0), thinker, batch)
    (_, _), (first, estimate), (second, _) = passes
    is_noisy = first.t > 0
    guess = model.out(estimate)
    assert torch.equal(second.x_0[is_noisy], guess[is_noisy])
    assert torch.equal(second.x_0[~is_noisy], first.x_0[~is_noisy])
    assert not estimate.requires_grad
    assert not second.x_0.requires_grad
    assert not torch.allclose(plain["flow"], conditioned["flow"])
    assert torch.allclose(plain["stop"], conditioned["stop"])  # clean blocks are told nothing


def test_the_stop_loss_asks_of_every_real_block_whether_it_is_the_last():
    thinker = tiny_thinker()
    batch, size = tiny_batch(thinker), thinker.denoiser.config.num_latents
    _, hidden = run(thinker, batch)
    nats = []
    for row, count in enumerate(batch.num_blocks.tolist()):
        for block in range(1, count + 1):
            states = hidden.latents[row : row + 1, (block - 1) * size : block * size]
            share = thinker.denoiser.stop_logit(states).sigmoid()[0]
            nats.append(-(share if block == count else 1 - share).log())
    loss = losses_of(CERTAIN, thinker, batch)["stop"]
    assert torch.allclose(loss.double(), torch.stack(nats).mean(), rtol=1e-5)


def test_the_clean_context_of_half_of_the_rows_is_noised_a_little_and_does_not_say_so():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker, rows=200)
    sequence, _ = run(thinker, batch, replace(CERTAIN, context_noise=0.1))
    latents, clean = sequence.inputs[1], batch.blocks.flatten(1, 2)
    t = sequence.t[:, : clean.shape[1]]
    assert (latents.t[:, : t.shape[1]] == 0).all()
    given = latents.z_t[:, : t.shape[1]]
    assert torch.equal(given, latents.x_0[:, : t.shape[1]])
    moved = (given - clean).abs().amax((1, 2))
    assert 70 < int((moved > 0).sum()) < 130
    assert torch.equal(moved > 0, t[:, 0] > 0)
    assert 0.08 < t.max() <= 0.1


def test_the_times_of_every_block_are_spread_evenly_over_the_rows():
    thinker = tiny_thinker()
    batch, size = tiny_batch(thinker, rows=50), thinker.denoiser.config.num_latents
    sequence, _ = run(thinker, batch, replace(CERTAIN, settings=ThoughtObjective(times="uniform")))
    t = sequence.t[:, 3 * size :: size]  # of the noisy blocks
    assert t.shape == (50, 3)
    assert torch.allclose(t.sort(dim=0).values.diff(dim=0), torch.tensor(1 / 50).double(), atol=1e-5)
    assert not torch.equal(t[:, 0].argsort(), t[:, 1].argsort())


def test_rows_draw_the_same_noise_whatever_blocks_they_have():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    other = replace(batch, blocks=batch.blocks + 1, num_blocks=4 - batch.num_blocks)
    (one, _), (two, _) = run(thinker, batch), run(thinker, other)
    noise = [seq.inputs[1].z_t - (1 - seq.t[..., None]) * seq.x_0 for seq in (one, two)]
    assert torch.allclose(*noise, atol=1e-12)
    assert torch.equal(one.t, two.t)
    first, again, later = (losses_of(CERTAIN, thinker, batch, step=step)["loss"] for step in (3, 3, 4))
    assert first == again != later


def with_itself(batch):
    """Let each row be the only known train of thought of its prompt."""
    return replace(batch, same_prompt=torch.arange(len(batch.prompt))[:, None])


def test_rollout_keeps_the_answers_gradient_out_of_the_thoughts():
    thinker = tiny_thinker()
    batch = with_itself(tiny_batch(thinker))
    losses_of(RolloutLoss(steps=2), thinker, batch, table=batch)["rollout"].backward()
    grad = thinker.denoiser.out.weight.grad  # only the thoughts use this head
    assert grad is None or grad.abs().sum() == 0


def test_rollout_teaches_every_step_of_its_own_trajectory():
    """The flow loss by hand: the x_0 error of each estimate, weighed at its own noisy latents."""
    thinker = tiny_thinker()
    model, batch = thinker.denoiser, tiny_batch(thinker)
    batch = with_itself(replace(batch, answer=batch.answer[:, :0], is_answer=batch.is_answer[:, :0]))
    objective = RolloutLoss(steps=3)
    losses = losses_of(objective, thinker, batch, table=batch)
    assert set(losses) == {"rollout_flow", "loss"}
    rows, count, size, dim = batch.blocks.shape
    index, before, total = torch.arange(rows)[:, None], batch.blocks[:, :0].flatten(1, 2), 0.0
    for block in range(count):
        z = normal(0, 0, 11, index, block + 1, torch.arange(size * dim)).to(before).view(rows, size, dim)
        estimates = objective.estimates(model, batch, before, z)
        for (t, x_0), wanted in zip(estimates, (1, 2 / 3, 1 / 3), strict=True):
            assert float(t) == pytest.approx(wanted)
            error = (x_0 - batch.blocks[:, block]).square().mean(-1) * (block < batch.num_blocks)[:, None]
            total = total + error.sum() / max(wanted, 0.2)
        before = torch.cat([before, x_0.detach()], dim=1)
    expected = total / (batch.num_blocks.sum() * size * 3)
    assert torch.allclose(losses["rollout_flow"].double(), expected.double(), rtol=1e-5)
    losses["loss"].backward()
    assert model.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weighting", ["inverse-t", "elbo", "unit"])
def test_rollout_is_finite_however_it_is_weighted(weighting):
    thinker = tiny_thinker(weighting=weighting)
    batch = with_itself(tiny_batch(thinker))
    losses = losses_of(RolloutLoss(steps=2), thinker, batch, table=batch)
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_step_without_any_answer_has_a_loss():
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    batch = replace(batch, is_answer=torch.zeros_like(batch.is_answer))
    losses = losses_of(CERTAIN, thinker, batch)
    assert losses["answer"] == 0
    assert torch.isfinite(losses["loss"])


def test_rollout_takes_the_nearest_known_train_of_thought_and_its_answer():
    batch = tiny_batch(tiny_thinker())
    rows = len(batch.prompt)
    known = replace(
        batch,
        prompt=batch.prompt.repeat(2, 1),
        is_prompt=batch.is_prompt.repeat(2, 1),
        blocks=torch.cat([batch.blocks, batch.blocks + 1]),
        num_blocks=batch.num_blocks.repeat(2),
        answer=torch.arange(2 * rows)[:, None].expand(-1, batch.answer.shape[1]),
        is_answer=batch.is_answer.repeat(2, 1),
    )
    own_and_other = torch.stack([torch.arange(rows), torch.arange(rows) + rows], dim=1)
    batch = replace(batch, same_prompt=own_and_other)
    far_beyond_the_end = batch.blocks.clone()
    far_beyond_the_end[torch.arange(batch.blocks.shape[1]) >= batch.num_blocks[:, None]] = 9.0
    assert nearest(known, batch, far_beyond_the_end + 0.2).answer[:, 0].tolist() == list(range(rows))
    found = nearest(known, batch, batch.blocks + 0.8)
    assert found.answer[:, 0].tolist() == list(range(rows, 2 * rows))
    assert torch.equal(found.blocks, batch.blocks + 1)


def test_rollout_estimates_a_block_the_same_whether_or_not_the_row_itself_goes_so_far():
    """The nearest train of thought may be the longer one: its blocks were denoised as they are at sampling."""
    thinker = tiny_thinker()
    batch = tiny_batch(thinker)
    z = torch.randn(batch.blocks[:, 0].shape, dtype=torch.float64)
    found = [
        RolloutLoss(steps=2).estimates(thinker.denoiser, row, batch.blocks[:, :2].flatten(1, 2), z)[-1][1]
        for row in (replace(batch, num_blocks=torch.full_like(batch.num_blocks, n)) for n in (1, 3))
    ]
    assert torch.equal(*found)


def test_rows_of_one_prompt_know_each_other():
    found = rows_of_same_prompt([*"abaca"]).tolist()
    assert found == [[0, 2, 4], [1, 1, 1], [2, 4, 0], [3, 3, 3], [4, 0, 2]]
    assert rows_of_same_prompt(["a"] * 100).shape == (100, 64)  # a table of all pairs would grow with their square


def test_a_model_learns_one_batch_by_heart():
    thinker = tiny_thinker(seed=1)
    model, batch = thinker.denoiser.float(), tiny_batch(thinker)
    batch = replace(batch, blocks=batch.blocks.float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    seen = []
    for step in range(35):
        losses = losses_of(CERTAIN, thinker, batch, step=step)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: float(loss.detach()) for name, loss in losses.items()})
    for name in ("flow", "answer", "stop"):
        assert sum(s[name] for s in seen[-5:]) < 0.8 * sum(s[name] for s in seen[:5]), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LatentDenoiser(LatentDenoiserConfig(answer="masked")), "answer must be 'autoregressive'; others were"),
        (lambda: LatentDenoiser(LatentDenoiserConfig(parametrization="v")), "parametrization must be 'x0'"),
        (lambda: LatentDenoiser(LatentDenoiserConfig(hidden_size=30)), "hidden_size must be a multiple of 8; got 30"),
        (lambda: ThoughtObjective(answer_weight=-1.0), "objective.answer_weight must be at least 0; got -1"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
