"""Block diffusion and the autoregressive baseline against separate forwards and plain transformers."""

from dataclasses import replace
from itertools import product
from math import gamma

import pytest
import torch
from tiny import tiny_lm

from redraft.layouts import Layout, attention_mask
from redraft.likelihood.objectives.autoregressive import Autoregressive
from redraft.likelihood.objectives.diffusion import Diffusion
from redraft.likelihood.problem import CleanRows, NoiseKey, draw_noise, problem_loss
from redraft.models.denoiser import Denoiser
from redraft.processes.masked import MaskedDiffusion
from redraft.processes.uniform import UniformDiffusion

LENGTH, BATCH, VOCAB = 12, 3, 40
MASKED = MaskedDiffusion(mask_token_id=2)


def key(step=0, batch=BATCH):
    return NoiseKey(seed=1, step=step, rows=torch.arange(batch), total_rows=batch)


def clean_rows(*, segments=None, batch=BATCH, length=LENGTH, **changes):
    x_0 = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))
    segment_ids = torch.ones_like(x_0) if segments is None else torch.tensor(segments).expand(batch, -1)
    return CleanRows(x_0=x_0, segment_ids=segment_ids, is_target=segment_ids > 0, **changes)


def denoiser_of(*, shift_logits=False, block_size=None, **options):
    lm = tiny_lm(shift_logits=shift_logits, scale=4.0, **options)
    settings = replace(lm.denoiser.settings, block_size=block_size)
    return Denoiser(lm.model, settings)


def answers(denoiser, problem):
    """Logits of a problem."""
    with torch.no_grad():
        return denoiser(problem.query)


def block_by_block(denoiser, noised, rows, block_size):
    """Forward each block of each document by itself, after its clean prefix; logits (B, L, V)."""
    found = torch.zeros(*noised.x_t.shape, VOCAB, dtype=torch.float64)
    for row in range(len(noised.x_t)):
        segments = rows.segment_ids[row] if rows.isolate_segments else (rows.segment_ids[row] > 0).long()
        for segment in segments[segments > 0].unique():
            index = (segments == segment).nonzero()[:, 0]
            for start in range(0, len(index), block_size):
                block = index[start : start + block_size]
                canvas = torch.cat([rows.x_0[row, index[:start]], noised.x_t[row, block]])[None]
                with torch.no_grad():
                    logits = denoiser.logits(canvas, layout=Layout(block_size=block_size))
                found[row, block] = logits[0, start:]
    return found


@pytest.mark.parametrize("shift_logits", [False, True])
@pytest.mark.parametrize("process", [MASKED, UniformDiffusion(vocab_size=VOCAB)], ids=["masked", "uniform"])
@pytest.mark.parametrize("block_size", [1, 3, 5, 12])
@pytest.mark.parametrize(
    "rows",
    [
        clean_rows(has_padding=False),
        clean_rows(segments=[1] * 9 + [0] * 3),
        clean_rows(segments=[1] * 4 + [2] * 7 + [3], has_padding=False, isolate_segments=True),
    ],
    ids=["whole", "padded", "packed"],
)
def test_the_logits_of_one_forward_equal_those_of_each_block_forwarded_alone(rows, block_size, process, shift_logits):
    denoiser = denoiser_of(shift_logits=shift_logits)
    problem = Diffusion(process=process, block_size=block_size).problem(rows, key())
    seen = problem.query.input_ids[:, :LENGTH]
    noised = draw_noise(process, rows, key())  # for its shape: x_t is the problem's
    expected = block_by_block(denoiser, replace(noised, x_t=seen), rows, block_size)
    row, position = problem.query.where // (2 * LENGTH), problem.query.where % (2 * LENGTH)
    assert (position < LENGTH).all()  # nothing is asked of the clean copy
    assert (answers(denoiser, problem) - expected[row, position]).abs().max() < 1e-5
    causal = replace(problem, query=replace(problem.query, layout=Layout()))  # the test can fail
    assert block_size == 12 or (answers(denoiser, causal) - expected[row, position]).abs().max() > 1e-3


@pytest.mark.parametrize("shift_logits", [False, True])
def test_packed_documents_are_predicted_as_if_each_were_alone(shift_logits):
    denoiser = denoiser_of(shift_logits=shift_logits)
    rows = clean_rows(segments=[1] * 4 + [2] * 7 + [3], has_padding=False, isolate_segments=True)
    problem = Diffusion(process=MASKED).problem(rows, key())
    found = answers(denoiser, problem)
    expected = torch.zeros(BATCH, LENGTH, VOCAB, dtype=torch.float64)
    for document in (slice(0, 4), slice(4, 11), slice(11, 12)):
        with torch.no_grad():
            expected[:, document] = denoiser.logits(problem.query.input_ids[:, document])
    assert (found - expected.flatten(0, 1)[problem.query.where]).abs().max() < 1e-5


def test_the_mask_of_the_two_copies_is_the_papers():
    positions = torch.arange(4).repeat(2)[None]
    mask = attention_mask(Layout(block_size=2, is_two_copy=True), positions)[0, 0].int().tolist()
    assert mask == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


def totals(denoiser, problem, **options):
    with torch.no_grad():
        return problem_loss(denoiser, problem, num_rows=BATCH, **options)[1]


def test_the_blocks_of_a_step_have_one_size_out_of_the_doublings_each_as_often():
    objective, rows = Diffusion(process=MASKED, block_size=12, smallest_block=2), clean_rows(has_padding=False)
    sizes = []
    for step in range(400):
        at = replace(key(), step=step)
        problem = objective.problem(rows, at)
        sizes.append(problem.query.layout.block_size)
        same = Diffusion(process=MASKED, block_size=sizes[-1]).problem(rows, at)
        assert torch.equal(problem.query.input_ids, same.query.input_ids)
    counts = [sizes.count(size) for size in (2, 4, 8, 12)]
    assert sum(counts) == 400
    assert all(abs(count - 100) < 4 * 75**0.5 for count in counts)
    assert objective.evaluation().problem(rows, key()).query.layout.block_size == 12


@pytest.mark.parametrize("has_plain_head", [True, False])
def test_one_block_as_long_as_the_row_is_masked_diffusion(has_plain_head):
    denoiser, rows = denoiser_of(), clean_rows(has_padding=False)
    block = Diffusion(process=MASKED, block_size=LENGTH).problem(rows, key())
    whole = Diffusion(process=MASKED).problem(rows, key())
    found = totals(denoiser, block, has_plain_head=has_plain_head)
    assert torch.allclose(found, totals(denoiser, whole), atol=1e-4)


def test_blocks_of_one_token_under_full_noise_are_the_autoregressive_model():
    denoiser = denoiser_of(shift_logits=True)
    for segments, isolate in ((None, False), ([1] * 5 + [2] * 4 + [0] * 3, True), ([1] * 8 + [0] * 4, False)):
        rows = clean_rows(segments=segments, isolate_segments=isolate)
        full_noise = Diffusion(
            process=MaskedDiffusion(mask_token_id=2, exclude_mask=False), block_size=1, t_min=1 - 1e-9
        )
        expected = totals(denoiser, Autoregressive(mask_token_id=2).problem(rows, key()))
        assert torch.allclose(totals(denoiser, full_noise.problem(rows, key())), expected, atol=1e-4)


def test_the_autoregressive_loss_is_that_of_the_plain_causal_model():
    lm = tiny_lm(scale=4.0)
    lm.model.config.is_causal = True
    rows = clean_rows(segments=[1] * 10 + [0] * 2)
    with torch.no_grad():
        log_p = lm.model(input_ids=rows.x_0).logits.log_softmax(-1)
        alone = lm.model(input_ids=torch.tensor([[2]])).logits.log_softmax(-1)[0, 0]
    later = log_p[:, :-1].gather(2, rows.x_0[:, 1:, None])[:, :9, 0].sum(dim=1)
    expected = -(later + alone[rows.x_0[:, 0]])
    found = totals(lm.denoiser, Autoregressive(mask_token_id=2).problem(rows, key()))
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_only_targets_are_noised_and_scored():
    rows = clean_rows(has_padding=False)
    is_target = torch.arange(LENGTH).expand(BATCH, -1) >= 7
    rows = replace(rows, is_target=is_target)
    for objective in (
        Diffusion(process=MASKED), Diffusion(process=MASKED, is_complementary=True),
        Diffusion(process=UniformDiffusion(vocab_size=VOCAB)), Diffusion(process=MASKED, block_size=4),
    ):  # fmt: skip
        problem = objective.problem(rows, key())
        prompt = problem.query.input_ids[:, :LENGTH][:, :7]
        assert torch.equal(prompt, rows.x_0.repeat(len(prompt) // BATCH, 1)[:, :7])
        assert (problem.query.where % problem.query.input_ids.shape[1] >= 7).all()
    problem = Autoregressive(mask_token_id=2).problem(rows, key())
    assert len(problem.query.where) == int(is_target.sum())


def test_each_block_has_a_time_of_its_own_stratified_over_the_rows():
    total, blocks = 64, 4
    block = (torch.arange(LENGTH) // 3).expand(total, -1)
    ones = torch.ones(total, LENGTH, dtype=torch.int64)
    rows, levels = CleanRows(x_0=ones, segment_ids=ones, is_target=ones.bool()), []
    for step in range(200):
        where = NoiseKey(seed=0, step=step, rows=torch.arange(total), total_rows=total)
        t = draw_noise(MASKED, rows, where, t_min=0.0, block=block).t
        assert torch.equal(t[:, 0::3], t[:, 2::3])  # one time per block
        levels.append(t[:, ::3])
        strata = (levels[-1] * total - 1e-9).floor().sort(dim=0).values
        assert (strata.diff(dim=0) >= 0.5).all()  # no two rows of a block in the same stratum
        whole = draw_noise(MASKED, rows, where, t_min=0.0)
        assert torch.allclose(whole.t[:, 0], t[:, 0], atol=1e-12)
    levels = torch.cat(levels)  # (200 * 64, 4)
    assert levels.min() > 0
    assert levels.max() <= 1
    assert (levels.T.corrcoef() - torch.eye(blocks)).abs().max() < 0.05  # independent within a row


def test_the_block_nelbo_equals_its_closed_form():
    """4 tokens in blocks of 2: per block, each of its 3 mask patterns with its Beta weight (see test_masked)."""
    denoiser, rows = denoiser_of(), clean_rows(batch=1, length=4, has_padding=False)
    expected = 0.0
    for start, pattern in product((0, 2), ((0, 1), (1, 0), (1, 1))):
        k, is_masked = sum(pattern), torch.tensor(pattern).bool()
        x_t = torch.where(is_masked, 2, rows.x_0[0, start : start + 2])
        canvas = torch.cat([rows.x_0[0, :start], x_t])[None]
        with torch.no_grad():
            logits = denoiser.logits(canvas, layout=Layout(block_size=2))[0, start:].index_fill(
                1, torch.tensor([2]), -torch.inf
            )
        nll = -logits.log_softmax(-1).gather(1, rows.x_0[0, start : start + 2, None])[:, 0]
        expected += gamma(k) * gamma(3 - k) / gamma(3) * float(nll[is_masked].sum())
    samples = 20_000
    many = CleanRows(
        x_0=rows.x_0.expand(samples, -1), segment_ids=torch.ones(samples, 4, dtype=torch.int64),
        is_target=torch.ones(samples, 4, dtype=torch.bool), has_padding=False,
    )  # fmt: skip
    objective = Diffusion(process=MASKED, block_size=2).evaluation()
    with torch.no_grad():
        nats = problem_loss(denoiser, objective.problem(many, key(batch=samples)), num_rows=samples)[1].double()
    standard_error = float(nats.std() / samples**0.5)
    assert abs(float(nats.mean()) - expected) < 4 * standard_error
    assert standard_error < 0.02 * expected


def test_gradients_reach_the_model_through_both_copies():
    denoiser = denoiser_of()
    rows = clean_rows(has_padding=False)
    total, _ = problem_loss(denoiser, Diffusion(process=MASKED, block_size=3).problem(rows, key()), num_rows=BATCH)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.model.parameters())


def test_drafts_are_distilled_from_the_models_own_text():
    """KL between what a causal forward predicts and what a forward of each noised block does; the first is fixed."""
    lm = tiny_lm(block_size=4, within="causal", shift_logits=True)
    process = MaskedDiffusion(mask_token_id=2)
    objective = Diffusion(
        process=process, block_size=4, context="causal", within="causal", t_min=1.0, is_distilled=True
    )
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = CleanRows(
        x_0=ids, segment_ids=torch.ones_like(ids), is_target=torch.ones_like(ids).bool(), has_padding=False
    )
    key = NoiseKey(seed=0, step=0, rows=torch.arange(2), total_rows=2)
    total, nats = problem_loss(lm.denoiser, objective.problem(rows, key), num_rows=2)
    expected = torch.zeros(2, dtype=torch.float64)
    for row in range(2):
        p = lm.denoiser.logits(ids[row : row + 1])[0]  # shifted: position i predicted by i - 1
        for start in (0, 4, 8):
            noised = ids[row : row + 1, : start + 4].clone()
            noised[:, start:] = 2
            q = lm.denoiser.logits(noised, committed=torch.tensor([start]))[0]
            for position in range(start + 1, start + 4):
                expected[row] += process.divergence(p[position : position + 1], q[position : position + 1])[0].detach()
    torch.testing.assert_close(nats.double(), expected, atol=1e-4, rtol=1e-4)
    assert float(total.detach()) == pytest.approx(float(expected.sum()), rel=1e-4)
    alone = replace(rows, is_target=torch.arange(12).expand(2, -1) == 8)  # the first of a block: nothing to learn
    total, _ = problem_loss(lm.denoiser, objective.problem(alone, key), num_rows=2)
    assert float(total.detach()) == 0
    logits = torch.randn(4, 40, requires_grad=True)
    problem = objective.problem(rows, key)
    problem.nats(logits, slice(0, 4)).sum().backward()
    assert (logits.grad[1::2] == 0).all()
    assert (logits.grad[::2].abs().sum(dim=-1) > 0).all()
