"""The likelihood estimator: unbiased on toys, equal to the published one, honest error bars, early decisions."""

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

from redraft.likelihood.control import _features
from redraft.likelihood.decide import undecided
from redraft.likelihood.estimate import loglikelihoods, sample_values, score_questions
from redraft.likelihood.masks import draw_masks
from redraft.likelihood.requests import LikelihoodConfig, Request, rolling_requests
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
        config = LikelihoodConfig()
        total += float(sample_values(denoiser, request(context, continuation), masks, config).mean()) / length
    return total


SCHEMES = ["weighted", "stratified", "antithetic", "independent"]


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("block_size", [None, 4])
def test_estimates_are_unbiased_where_the_likelihood_is_known(scheme, block_size, control):
    joint = random_joint(7)
    context, continuation = [1], [2, 0, 1, 1, 2, 0]
    expected = (joint[(1, *continuation)] / joint[1].sum()).log()
    denoiser = ExactDenoiser(joint, block_size=block_size)
    config = LikelihoodConfig(samples=6, masks=scheme, control=control, share_context=False)
    runs = [loglikelihoods(denoiser, [request(context, continuation, key)], config)[0] for key in range(60)]
    values = torch.tensor([run.nats for run in runs])
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)) + 1e-9
    assert values.std() > 0


def test_blocks_of_one_token_give_the_chain_rule_exactly():
    joint = random_joint(5)
    denoiser = ExactDenoiser(joint, block_size=1)
    config = LikelihoodConfig(share_context=False)
    found = loglikelihoods(denoiser, [request([], [0, 2, 1, 1, 0])], config)[0]
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
    config = LikelihoodConfig(samples=16)
    runs = [loglikelihoods(denoiser, [request([], continuation, key)], config)[0] for key in range(80)]
    z = torch.tensor([(run.nats - truth) / run.standard_error for run in runs])
    assert (z.abs() < 2).float().mean() > 0.8
    spread = torch.tensor([run.nats for run in runs]).std()
    stated = torch.tensor([run.standard_error for run in runs]).square().mean().sqrt()
    assert 0.9 < stated / spread < 2.5  # never far too small; a little too large is the collapsed strata's price


def published(lm, context, continuation, masks, *, cfg_scale=0.0):
    """LLaDA's evaluation, written down directly: cross-entropy at the masks over the masked share, averaged."""
    tokens = torch.cat([context, continuation]).repeat(len(masks), 1)
    is_masked = F.pad(masks, (len(context), 0))
    noised = torch.where(is_masked, 2, tokens)
    logits = lm.logits(noised)
    if cfg_scale:
        blind = noised.clone()
        blind[:, : len(context)] = 2
        unconditional = lm.logits(blind)
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
    share = masks.sum(dim=1, keepdim=True) / masks.shape[1]
    nats = F.cross_entropy(logits[is_masked], tokens[is_masked], reduction="none")
    return -float((nats / share.expand_as(is_masked)[is_masked]).sum() / len(masks))


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
@pytest.mark.parametrize("context_len", [0, 5])
def test_equals_the_published_estimator_given_the_same_masks(lm, cfg_scale, context_len):
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(3, 40, (context_len,), generator=generator)
    continuation = torch.randint(3, 40, (11,), generator=generator)
    masks = draw_masks(11, 32, key=5, scheme="stratified").is_masked
    config = LikelihoodConfig(samples=32, masks="stratified", control=False, cfg_scale=cfg_scale, exclude_mask=False)
    expected = published(lm, context, continuation, masks, cfg_scale=cfg_scale)
    one = Request(context=context, continuation=continuation, key=5)
    assert float(sample_values(lm.denoiser, one, masks, config).mean()) == pytest.approx(expected, abs=1e-5)
    assert loglikelihoods(lm.denoiser, [one], config)[0].nats == pytest.approx(expected, abs=1e-5)
    excluded = loglikelihoods(lm.denoiser, [one], replace(config, exclude_mask=True))[0].nats
    assert excluded > expected + 1e-6  # the control: another softmax is another number


def test_a_request_does_not_depend_on_its_batch(lm):
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randint(3, 40, (n,), generator=generator)  # noqa: E731
    requests = [Request(context=draw(c), continuation=draw(n), key=c) for c, n in [(3, 9), (20, 5), (0, 14), (8, 8)]]
    config = LikelihoodConfig(samples=16)
    together = loglikelihoods(lm.denoiser, requests, config)
    for alone in (config, replace(config, batch_tokens=40)):
        for i, one in enumerate(requests):
            assert loglikelihoods(lm.denoiser, [one], alone)[0].nats == pytest.approx(together[i].nats, abs=1e-5)


@given(length=st.integers(8, 40), pairs=st.integers(2, 20), key=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_counts_are_stratified_and_pairs_antithetic(length, pairs, key):
    masks = draw_masks(length, 2 * pairs, key=key, scheme="antithetic").is_masked
    counts = masks.sum(dim=1)
    assert torch.equal(counts[:pairs] + counts[pairs:], torch.full((pairs,), length + 1))
    assert torch.equal((masks[:pairs] & masks[pairs:]).sum(dim=1), torch.ones(pairs, dtype=torch.int64))
    ordered = counts.sort().values.double() - 0.5  # one count in each stratum of (0, length]
    middle = (torch.arange(2 * pairs) + 0.5) * length / (2 * pairs)
    assert (ordered - middle).abs().max() <= length / (2 * pairs) + 1


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
    variance = {}
    for scheme, control in [(scheme, False) for scheme in SCHEMES] + [("weighted", True)]:
        config = LikelihoodConfig(samples=16, masks=scheme, control=control)
        variance[scheme, control] = spread_over_keys(denoiser, continuation, config, 60)[0].var().item()
    factors = {idea: variance["independent", False] / value for idea, value in variance.items()}
    print("variance reduction:", {idea: round(factor, 1) for idea, factor in factors.items()})
    assert factors["stratified", False] > 1.5
    assert factors["antithetic", False] > 1.5
    assert factors["weighted", False] > factors["stratified", False]
    assert factors["weighted", True] > 2 * factors["stratified", False]
    assert factors["weighted", True] > 1.3 * factors["weighted", False]


@pytest.mark.parametrize("samples", [4, 16])
def test_control_variates_leave_the_mean_and_the_stated_error_honest(samples):
    denoiser, continuation = ExactDenoiser(random_joint(8, seed=2), noise=0.8), [0, 1, 2, 1, 0, 2, 2, 1]
    truth = exact_bound(denoiser, [], continuation)
    values, errors = spread_over_keys(denoiser, continuation, LikelihoodConfig(samples=samples), 200)
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values))
    stated = torch.tensor(errors).square().mean().sqrt()
    assert 0.85 < stated / values.std() < 1.6


def test_what_is_foretold_of_a_token_has_the_mean_that_is_added_back():
    """The identity that unbiasedness rests on, over every mask; half of the masks are the control."""
    masks = draw_masks(5, 32, key=0, most=32)
    x, held = _features(masks.is_masked), masks.is_masked.double() * masks.weight[:, None]
    assert torch.allclose(held.sum(dim=0), torch.ones(5, dtype=torch.float64))
    mean = torch.einsum("sl,slp->lp", held, x)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-12)
    assert not torch.allclose(torch.einsum("sl,slp->lp", held[::2], x[::2]), torch.zeros_like(mean), atol=1e-3)


def four_choice_suite(num_questions=12):
    """Questions over 8 tokens: the right continuation is drawn from the truth, the other three at random."""
    joint = random_joint(8)
    generator = torch.Generator().manual_seed(3)
    questions, answers = [], []
    for number in range(num_questions):
        given = joint[number % MASK].flatten()
        drawn = int(torch.multinomial(given, 1, generator=generator))
        right = [drawn // MASK**i % MASK for i in reversed(range(7))]
        choices = torch.randint(0, MASK, (3, 7), generator=generator).tolist()
        answers.append(int(torch.randint(4, (1,), generator=generator)))
        choices.insert(answers[-1], right)
        questions.append([request([number % MASK], choice, key=number) for choice in choices])
    return ExactDenoiser(joint, noise=0.4), questions, answers


def test_deciding_early_saves_half_the_forwards_at_the_same_accuracy():
    denoiser, questions, answers = four_choice_suite()
    right, work = [], []
    for confidence in (None, 0.95):
        results = score_questions(denoiser, questions, LikelihoodConfig(samples=120, confidence=confidence))
        best = [max(range(4), key=lambda i: choices[i].nats) for choices in results]
        right.append(sum(a == b for a, b in zip(best, answers, strict=True)))
        work.append(sum(choice.forwards for choices in results for choice in choices))
    print("right of", len(questions), ":", right, "forwards:", work)
    assert right[1] >= right[0]
    assert work[0] >= 2 * work[1]


@pytest.mark.parametrize(
    ("errors", "rivals", "looks", "is_decided"),
    [
        # normal quantiles: 0.05 -> 1.64, 0.05 / 3 -> 2.13, 0.05 / 4 -> 2.24, 0.05 / 12 -> 2.64
        (1.5, 1, 1, False), (1.9, 1, 1, True), (1.9, 3, 1, False), (1.9, 1, 4, False),
        (2.4, 3, 1, True), (2.4, 1, 4, True), (2.4, 3, 4, False), (2.9, 3, 4, True),
    ],
)  # fmt: skip
def test_doubt_is_shared_among_rivals_and_looks(errors, rivals, looks, is_decided):
    """The paired difference is `errors` standard errors: units of +10 and -10 in turn have a mean of variance 1."""
    units = torch.tensor([10.0, -10.0]).repeat(100).double()
    rounds = {0: [units + errors], 1: [torch.zeros(200).double()]}
    left = undecided(rounds, [[1.0, 1.0]], confidence=0.95, looks=looks, rivals=rivals)
    assert left == (set() if is_decided else {0, 1})


def test_both_rankings_must_be_decided_before_sampling_stops():
    denoiser, questions, _ = four_choice_suite(2)
    config = LikelihoodConfig(samples=32, confidence=0.9)
    plain = score_questions(denoiser, questions, config)
    even = score_questions(denoiser, questions, config, lengths=[[1.0] * 4] * 2)
    tied = score_questions(denoiser, questions[:1], config, lengths=[[-c.nats for c in plain[0]]])
    assert plain == even
    assert sum(choice.forwards == 32 for choice in tied[0]) >= 2


def test_rolling_windows_score_every_token_once():
    tokens = torch.arange(23)
    for window, context in [(8, 0), (8, 3), (30, 0)]:
        requests = rolling_requests(tokens, window=window, context=context)
        assert torch.equal(torch.cat([r.continuation for r in requests]), tokens)
        assert all(len(r.context) + len(r.continuation) <= window for r in requests)
        for r in requests[1:]:
            assert len(r.context) == context


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LikelihoodConfig(samples=5), "samples must be an even number of at least 4; got 5"),
        (lambda: LikelihoodConfig(confidence=1.0), r"confidence is a probability in \[0.5, 1\); got 1.0"),
        (lambda: request([1], []), "at least one token"),
        (lambda: rolling_requests(torch.arange(4), window=4, context=4), "must leave room in the window of 4"),
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
        (found,) = loglikelihoods(lm.denoiser, [asked], LikelihoodConfig(samples=2048, seed=seed))
        assert abs(found.nats - exact) < 4 * found.standard_error
        assert found.standard_error < 0.1 * abs(exact)
        assert found.forwards == 2048
    with pytest.raises(ValueError, match="knows no guidance; got cfg_scale 1.0"):
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
    config = LikelihoodConfig(samples=4, cfg_scale=cfg_scale)
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
    found = lm.loglikelihood([5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], samples=32)
    assert found.nats < 0 < found.standard_error
    assert (found.num_tokens, found.forwards) == (8, 32)
    with pytest.raises(ValueError, match="context of 128 tokens; got 130"):
        lm.loglikelihood([5] * 100, [6] * 30)
    with pytest.raises(ValueError, match="unknown setting 'sample'.*Did you mean 'samples'"):
        lm.loglikelihood([5], [6], sample=3)
