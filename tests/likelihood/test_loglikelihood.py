"""The likelihood estimator: unbiased on toys, equal to the published one, honest error bars."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_lm

from redraft.likelihood import spans
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import Request, loglikelihoods, mask_bounds, rolling_requests, score_spans
from redraft.likelihood.masks import Masks, _features, draw_masks
from redraft.likelihood.spans import MaskedSpan, WholeRows
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings
from redraft.processes.noised import Noised
from redraft.processes.uniform import UniformDiffusion

MASK = 3  # of the toys


class ExactDenoiser(Denoiser):
    """The true conditionals of a known joint distribution over V^L, blurred by `noise` where asked.

    With true conditionals every order of the chain rule gives log p(x), so the bound is tight.
    """

    def __init__(self, joint, *, block_size=None, noise=0.0):
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=MASK + 1))
        super().__init__(model, DiffusionSettings(mask_token_id=MASK, block_size=block_size))
        object.__setattr__(self, "joint", joint)
        object.__setattr__(self, "noise", noise)

    device = torch.device("cpu")

    def __call__(self, query, *, wrapped=None):
        x_t, where, segment_ids = query.input_ids, query.where, query.segment_ids
        seq, full = x_t.shape[1], self.joint.ndim
        out = torch.full((len(where), MASK + 1), -torch.inf, dtype=torch.float64)
        for n, flat in enumerate(where.tolist()):
            row, position = divmod(flat, seq)
            length = seq if segment_ids is None else int(segment_ids[row].sum())
            shown = [i < length and i != position and t != MASK for i, t in enumerate(x_t[row].tolist())]
            seen = [int(t) if is_shown else slice(None) for t, is_shown in zip(x_t[row], shown, strict=True)]
            rest = self.joint[tuple(seen + [slice(None)] * (full - seq))]
            axis = sum(isinstance(s, slice) for s in seen[:position])
            marginal = rest.movedim(axis, 0).reshape(MASK, -1).sum(dim=1)
            hidden = sum(isinstance(s, slice) for s in seen)
            out[n, :MASK] = marginal.log() * (1 - self.noise * hidden / full)
        return out


def random_joint(length, seed=0, concentration=0.6):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((MASK,) * length, generator=generator, dtype=torch.float64) / concentration
    return logits.flatten().softmax(0).view_as(logits)


def request(context, continuation, key=0):
    return Request(
        context=torch.tensor(context, dtype=torch.int64),
        continuation=torch.tensor(continuation, dtype=torch.int64),
        key=key,
    )


def exact_bound(denoiser, context, continuation):
    """Sum over every mask, by definition."""
    length, total = len(continuation), 0.0
    for count in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), count))
        masks = torch.zeros(len(subsets), length, dtype=torch.bool)
        for row, subset in enumerate(subsets):
            masks[row, list(subset)] = True
        total += float(sample_values(denoiser, request(context, continuation), masks).mean()) / length
    return total


def sample_values(denoiser, asked, is_masked, *, cfg_scale=0.0):
    """L / l * sum of log p(x_i) over each given mask, nats: one sample of the bound each."""
    masks = Masks(is_masked=is_masked, weight=is_masked.shape[1] / is_masked.sum(dim=1))
    span = MaskedSpan(tokens=asked.tokens, masks=masks, context_len=len(asked.context))
    plain, blind = (WholeRows(denoiser, [span], hides_context=hides) for hides in (False, True))
    scores = score_spans([span], plain, unguided=blind if cfg_scale else None, cfg_scale=cfg_scale)
    return scores[span][..., 0].sum(dim=1) * masks.weight


def whole_rows(denoiser, asked, config):
    """The estimate without shared blocks, which need keys and values."""
    (found,) = mask_bounds(denoiser, [asked], config, shares_blocks=False)
    return found


@pytest.mark.parametrize("block_size", [None, 4])
def test_estimates_are_unbiased_where_the_likelihood_is_known(block_size):
    joint = random_joint(7)
    context, continuation = [1], [2, 0, 1, 1, 2, 0]
    expected = (joint[(1, *continuation)] / joint[1].sum()).log()
    denoiser = ExactDenoiser(joint, block_size=block_size)
    config = LikelihoodConfig(num_samples=6)
    runs = [whole_rows(denoiser, request(context, continuation, key), config) for key in range(60)]
    values = torch.tensor([run.nats for run in runs])
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)) + 1e-9
    assert values.std() > 0


def test_blocks_of_one_token_give_the_chain_rule_exactly():
    joint = random_joint(5)
    denoiser = ExactDenoiser(joint, block_size=1)
    found = whole_rows(denoiser, request([], [0, 2, 1, 1, 0]), LikelihoodConfig())
    assert found.nats == pytest.approx(float(joint[0, 2, 1, 1, 0].log()), abs=1e-5)
    assert (found.standard_error, found.forwards) == (0, 5)


def test_short_continuations_are_summed_over_all_masks():
    denoiser = ExactDenoiser(random_joint(4), noise=0.5)
    found = loglikelihoods(denoiser, [request([1], [2, 0, 1])])[0]
    assert found.nats == pytest.approx(exact_bound(denoiser, [1], [2, 0, 1]), abs=1e-6)
    assert (found.standard_error, found.forwards) == (0, 7)


def test_standard_errors_cover_the_truth():
    denoiser = ExactDenoiser(random_joint(6), noise=0.8)
    continuation = [0, 1, 2, 1, 0, 2]
    truth = exact_bound(denoiser, [], continuation)
    config = LikelihoodConfig(num_samples=16)
    runs = [loglikelihoods(denoiser, [request([], continuation, key)], config)[0] for key in range(80)]
    z = torch.tensor([(run.nats - truth) / run.standard_error for run in runs])
    assert (z.abs() < 2).float().mean() > 0.8
    spread = torch.tensor([run.nats for run in runs]).std()
    stated = torch.tensor([run.standard_error for run in runs]).square().mean().sqrt()
    assert 0.9 < stated / spread < 2.5  # never far too small; a little too large is the collapsed strata's price


def published(lm, context, continuation, masks, *, cfg_scale=0.0):
    """LLaDA's evaluation, written down directly: cross-entropy at the masks over the masked share, averaged.

    Differs from LLaDA's code: the mask token has probability 0.
    """
    tokens = torch.cat([context, continuation]).repeat(len(masks), 1)
    is_masked = F.pad(masks, (len(context), 0))
    noised = torch.where(is_masked, 2, tokens)
    logits = lm.logits(noised)
    if cfg_scale:
        blind = noised.clone()
        blind[:, : len(context)] = 2
        unconditional = lm.logits(blind)
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
    logits = logits.index_fill(-1, torch.tensor([2]), -torch.inf)
    share = masks.sum(dim=1, keepdim=True) / masks.shape[1]
    nats = F.cross_entropy(logits[is_masked], tokens[is_masked], reduction="none")
    return -float((nats / share.expand_as(is_masked)[is_masked]).sum() / len(masks))


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
@pytest.mark.parametrize("context_len", [0, 5])
def test_equals_the_published_estimator_given_the_same_masks(lm, cfg_scale, context_len):
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(3, 40, (context_len,), generator=generator)
    continuation = torch.randint(3, 40, (11,), generator=generator)
    masks = draw_masks(11, 32, key=5).is_masked
    expected = published(lm, context, continuation, masks, cfg_scale=cfg_scale)
    one = Request(context=context, continuation=continuation, key=5)
    values = sample_values(lm.denoiser, one, masks, cfg_scale=cfg_scale)
    assert float(values.mean()) == pytest.approx(expected, abs=1e-5)
    assert float(values[1:].mean()) != pytest.approx(expected, abs=1e-5)  # the control: other masks, another number


def test_a_request_does_not_depend_on_its_batch(lm, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(3, 40, (n,), generator=generator)  # noqa: E731
    requests = [Request(context=draw(c), continuation=draw(n), key=c) for c, n in [(3, 9), (20, 5), (0, 14), (8, 8)]]
    config = LikelihoodConfig(num_samples=16)
    together = loglikelihoods(lm.denoiser, requests, config)
    for num_tokens in (2048, 40):
        monkeypatch.setitem(spans.TOKENS_PER_FORWARD, "cpu", num_tokens)
        for i, one in enumerate(requests):
            assert loglikelihoods(lm.denoiser, [one], config)[0].nats == pytest.approx(together[i].nats, abs=1e-5)


@given(length=st.integers(1, 40), num_samples=st.integers(4, 40), key=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_counts_are_stratified_and_the_weights_make_up_for_how_often_they_are_drawn(length, num_samples, key):
    masks = draw_masks(length, num_samples, key=key)
    counts = masks.is_masked.sum(dim=1)
    assert masks.is_exact == (2**length - 1 <= num_samples)
    if masks.is_exact:
        held = (masks.is_masked * masks.weight[:, None]).sum(dim=0)
        assert torch.allclose(held, torch.ones(length, dtype=torch.float64))
        return
    assert (counts.diff() >= 0).all()  # one stratum of the counts after the other
    p = 1 / (masks.weight * counts * num_samples)
    drawn = torch.tensor([(counts == n).sum() for n in counts.unique()]) / num_samples
    expected = torch.stack([p[counts == n][0] for n in counts.unique()])
    assert (drawn - expected).abs().max() <= 2 / num_samples


def spread_over_keys(denoiser, continuation, config, keys=150):
    runs = [loglikelihoods(denoiser, [request([], continuation, key)], config)[0] for key in range(keys)]
    return torch.tensor([run.nats for run in runs], dtype=torch.float64), [run.standard_error for run in runs]


def test_each_idea_reduces_the_variance():
    """Tokens of a text are not equally hard: here one in two has a likely value."""
    joint = random_joint(8)
    for axis in range(0, 8, 2):
        joint = joint * torch.tensor([30.0, 1.0, 1.0], dtype=torch.float64).view(
            [-1 if i == axis else 1 for i in range(8)]
        )
    denoiser, continuation = ExactDenoiser(joint / joint.sum(), noise=0.5), [0, 1, 0, 1, 0, 2, 0, 1]
    weighted = [draw_masks(8, 16, key=key).is_masked for key in range(60)]
    values, _ = spread_over_keys(denoiser, continuation, LikelihoodConfig(num_samples=16), 60)
    plain, independent = [], []
    for key, is_masked in enumerate(weighted):
        masks = draw_masks(8, 16, key=key)
        sums = sample_values(denoiser, request([], continuation), is_masked) / 8 * is_masked.sum(dim=1)
        plain.append(float((sums * masks.weight).sum()))
        generator = torch.Generator().manual_seed(key)
        counts = torch.randint(1, 9, (16, 1), generator=generator)
        any_masks = torch.rand(16, 8, generator=generator).argsort(dim=1).argsort(dim=1) < counts
        independent.append(float(sample_values(denoiser, request([], continuation), any_masks).mean()))
    independent, plain = torch.tensor(independent).var(), torch.tensor(plain).var()
    print("variance reduction:", float(independent / plain), float(independent / values.var()))
    assert independent > 1.5 * plain  # counts that are stratified and weighted
    assert plain > 1.3 * values.var()  # control variates


@pytest.mark.parametrize("samples", [4, 16])
def test_control_variates_leave_the_mean_and_the_stated_error_honest(samples):
    denoiser, continuation = ExactDenoiser(random_joint(8, seed=2), noise=0.8), [0, 1, 2, 1, 0, 2, 2, 1]
    truth = exact_bound(denoiser, [], continuation)
    values, errors = spread_over_keys(denoiser, continuation, LikelihoodConfig(num_samples=samples), 200)
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))
    stated = torch.tensor(errors).square().mean().sqrt()
    assert 0.85 < stated / values.std() < 1.6


def test_what_is_foretold_of_a_token_has_the_mean_that_is_added_back():
    """The identity that unbiasedness rests on, over every mask; half of the masks are the control."""
    masks = draw_masks(5, 32, key=0)
    x, held = _features(masks.is_masked), masks.is_masked.double() * masks.weight[:, None]
    assert torch.allclose(held.sum(dim=0), torch.ones(5, dtype=torch.float64))
    mean = torch.einsum("sl,slp->lp", held, x)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-12)
    assert not torch.allclose(torch.einsum("sl,slp->lp", held[::2], x[::2]), torch.zeros_like(mean), atol=1e-3)


def test_rolling_windows_score_every_token_once():
    tokens = torch.arange(23)
    for window in (8, 30):
        requests = rolling_requests(tokens, window=window, key=5)
        assert torch.equal(torch.cat([r.continuation for r in requests]), tokens)
        assert all(len(r.context) == 0 and len(r.continuation) <= window for r in requests)
        assert [r.key for r in requests] == list(range(5, 5 + len(requests)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LikelihoodConfig(num_samples=3), "num_samples must be at least 4; got 3"),
        (lambda: LikelihoodConfig(cfg_scale=-1.0), "cfg_scale must be at least 0; got -1.0"),
        (lambda: LikelihoodConfig(seed=-1), "seed must lie in .*; got -1"),
        (lambda: request([1], []), "at least one token"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class CharacterTokenizer:
    """One token per character, but "ab" is one too: it merges across a boundary."""

    def __call__(self, text, add_special_tokens=False):
        ids, i = [], 0
        while i < len(text):
            width = 2 if text[i : i + 2] == "ab" else 1
            ids.append(30 if width == 2 else 3 + ord(text[i]) % 26)
            i += width
        return {"input_ids": ids}

    def decode(self, ids, skip_special_tokens=False):
        return "".join("ab" if id == 30 else chr(ord("a") + (id - 3 - ord("a")) % 26) for id in ids)


def uniform_lm(**settings):
    lm = tiny_lm(vocab_size=5, scale=4.0, **settings)
    object.__setattr__(lm.denoiser, "settings", replace(lm.denoiser.settings, process="uniform"))
    return lm


def exact_uniform_bound(denoiser, context, continuation, *, cells):
    """Sum over all noised continuations, and over t by the midpoint rule."""
    process, size = UniformDiffusion(vocab_size=5), len(continuation)
    every = torch.cartesian_prod(*[torch.arange(5)] * size).view(-1, size)
    canvas = torch.cat([context.expand(len(every), -1), every], dim=1)
    with torch.no_grad():
        logits = denoiser.logits(canvas)[:, len(context) :].flatten(0, 1)
    total = 0.0
    for t in 1e-3 + (1 - 1e-3) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells:
        p = torch.where(every == continuation, 1 - t + t / 5, t / 5).prod(dim=1)
        where = Noised(
            x_0=continuation.repeat(len(every)), x_t=every.flatten(), t=t.expand(every.numel()),
            is_target=torch.ones(every.numel(), dtype=torch.bool),
        )  # fmt: skip
        total += float((p * process.loss(logits, where).view(len(every), size).sum(1)).sum()) / cells
    return -total


def test_the_bound_of_a_uniform_model_is_unbiased_within_its_error():
    lm, context, continuation = uniform_lm(), torch.tensor([3, 1]), torch.tensor([4, 0, 3])
    exact = exact_uniform_bound(lm.denoiser, context, continuation, cells=4000)
    asked = Request(context=context, continuation=continuation)
    for seed in range(3):
        (found,) = loglikelihoods(lm.denoiser, [asked], LikelihoodConfig(num_samples=2048, seed=seed))
        assert abs(found.nats - exact) < 4 * found.standard_error
        assert found.standard_error < 0.1 * abs(exact)
        assert found.forwards == 2048
    with pytest.raises(ValueError, match="guidance is not supported for a uniform process; got cfg_scale 1.0"):
        lm.loglikelihood(context, continuation, cfg_scale=1.0)


def autoregressive_lm():
    lm = tiny_lm(shift_logits=True, block_size=1)
    lm.model.config.is_causal = True
    object.__setattr__(lm.denoiser, "settings", replace(lm.denoiser.settings, process="autoregressive"))
    return lm


@pytest.mark.parametrize("num_context", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_an_autoregressive_likelihood_in_one_forward_is_that_of_blocks_of_one_token(num_context, length, cfg_scale):
    lm = autoregressive_lm()
    request = Request(context=torch.arange(3, 3 + num_context), continuation=torch.arange(10, 10 + length))
    config = LikelihoodConfig(num_samples=4, cfg_scale=cfg_scale)
    (found,) = loglikelihoods(lm.denoiser, [request], config)
    blocks = replace(lm.denoiser.settings, process="masked")
    object.__setattr__(lm.denoiser, "settings", blocks)
    (singly,) = loglikelihoods(lm.denoiser, [request], config)
    assert found.nats == pytest.approx(singly.nats, abs=1e-5)
    assert found.standard_error == singly.standard_error == 0
    rows = 1 + (num_context == 0 and length > 1)
    assert found.forwards == rows * (2 if cfg_scale else 1)
    assert singly.forwards == length * (2 if cfg_scale else 1)
    assert singly.is_greedy is None


def test_an_autoregressive_likelihood_tells_whether_the_continuation_is_greedy():
    lm = autoregressive_lm()
    context = torch.tensor([5, 9, 7])
    greedy = lm.generate([context], max_new_tokens=6, temperature=0.0, stop=None).tokens[0]
    assert lm.loglikelihood(context, greedy).is_greedy is True
    other = greedy.clone()
    other[3] = 3 if greedy[3] != 3 else 4
    assert lm.loglikelihood(context, other).is_greedy is False


def test_a_tokenizer_that_merges_across_the_boundary_keeps_the_context(lm):
    lm = replace(lm, tokenizer=CharacterTokenizer())
    for context, continuation in [("cca", "bcc"), ("cc", "abc"), ("cab ", "c")]:
        given, asked = lm.encode_pair(context, continuation)
        assert given.tolist() == lm.encode_pair(context.rstrip(), "")[0].tolist()
        assert len(given) + len(asked) >= len(lm.encode(context + continuation))
    assert lm.encode_pair("cab ", "c")[1].tolist() == lm.encode(" c").tolist()


def test_the_model_scores_texts_and_token_ids(lm):
    found = lm.loglikelihood([5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], num_samples=32)
    assert found.nats < 0 < found.standard_error
    assert (found.num_tokens, found.forwards) == (8, 32)
    with pytest.raises(ValueError, match="context of 128 tokens; got 130"):
        lm.loglikelihood([5] * 100, [6] * 30)
    with pytest.raises(ValueError, match="unknown setting 'samples'.*Did you mean 'num_samples'"):
        lm.loglikelihood([5], [6], samples=3)
