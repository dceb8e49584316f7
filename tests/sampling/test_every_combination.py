"""What must hold whatever policies are combined."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import tiny_lm

from redraft.prompts import row_keys
from redraft.sampling import policies as p
from redraft.sampling.batch import denoise
from redraft.sampling.canvas import Status, build_canvas
from redraft.sampling.sampler import Sampler

NEW, MASK, GRID = 12, 2, 4
few = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))

SCORES = [
    p.confidence, p.margin, p.negative_entropy, p.random_order,
    p.GumbelScore(score=p.confidence, temperature=0.3),
]  # fmt: skip
UNMASKS = [
    p.Quota(), p.TopK(k=2), p.Threshold(threshold=0.5), p.Threshold(threshold=0.9, at_least="quota"),
    p.Factor(factor=1.0), p.EntropyBound(bound=0.5), p.Bernoulli(), p.at_the_end,
]  # fmt: skip
BOTH = [p.Remasking(kind=kind, eta=0.3) for kind in ("cap", "rescale", "conf", "loop")] + [p.Rerank()]
FRONTIERS = [p.Blocks(), p.Blocks(size=4), p.Blocks(size=4, in_flight=2), p.Blocks(size=GRID, on_grid=True)]


CHOICES = {
    "both": st.sampled_from([None, *BOTH]),
    "unmask": st.sampled_from(UNMASKS),
    "edit": st.sampled_from([None, p.TokenEdit(threshold=0.3, max_post_steps=2)]),
    "steps": st.integers(1, 14),
    "frontier": st.sampled_from(FRONTIERS),
    "score": st.sampled_from(SCORES),
    "stop": st.sampled_from([p.filled, p.EndOfSequence(eos_token_ids=(1,))]),
    "temperature": st.sampled_from([0.0, 0.7]),
    "cfg_scale": st.sampled_from([0.0, 0.0, 1.5]),
    "cache": st.integers(0, 5),
}
choices = st.fixed_dictionaries(CHOICES)


def sampler_of(lm, *, both, unmask, edit, cache, **others):
    """Build one combination; a cache is one that the model's attention allows."""
    fitting = ("none", "prefix", "dual") if lm.denoiser.settings.block_size is None else ("none", "exact")
    unmask = both.unmask if both else unmask
    return Sampler(unmask=unmask, revise=both or edit, cache=fitting[cache % len(fitting)], **others)


LAYOUTS = {
    "full": {},
    "block-causal": {"block_size": GRID},
    "block-causal and shifted": {"block_size": GRID, "shift_logits": True},
    "causal context": {"block_size": GRID, "within": "full"},
    "causal context and shifted": {"block_size": GRID, "within": "full", "shift_logits": True},
    "all causal": {"block_size": GRID, "within": "causal"},
    "all causal and shifted": {"block_size": GRID, "within": "causal", "shift_logits": True},
    "decided tokens first": {"block_size": GRID, "within": "reordered"},
    "with the last token": {"block_size": GRID, "within": "with-last", "shift_logits": True},
}


FAST = ("full", "block-causal and shifted", "causal context", "with the last token")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def lm(request):
    return tiny_lm(**LAYOUTS[request.param])


def start(prompts):
    rows = [torch.tensor([*prompt] + [0] * NEW) for prompt in prompts]
    is_noise = [torch.arange(len(row)) >= len(row) - NEW for row in rows]
    return build_canvas(rows, is_noise, noise_token_id=MASK), row_keys([torch.tensor(p) for p in prompts], seed=3)


def run(lm, sampler, prompts):
    """Return the final tokens and statuses of every row, and its number of forwards."""
    canvas, keys = start(prompts)
    finals, forwards = {}, {}
    for step in denoise(lm.denoiser, canvas, sampler, row_keys=keys):
        for place, row in enumerate(step.rows.tolist()):
            length = len(prompts[row]) + NEW
            finals[row] = (step.canvas.tokens[place, :length].tolist(), step.canvas.status[place, :length].tolist())
            forwards[row] = int(step.num_forwards[place])
    return [finals[row] for row in range(len(prompts))], [forwards[row] for row in range(len(prompts))]


prompt = st.lists(st.integers(0, 39), min_size=1, max_size=9)  # EOS, which is the padding too, and the mask among them


@pytest.mark.slow
@few
@given(chosen=choices, prompts=st.lists(prompt, min_size=1, max_size=3))
def test_it_ends_changes_only_what_is_open_and_leaves_no_mask(lm, chosen, prompts):
    sampler = sampler_of(lm, **chosen)
    before, keys = start(prompts)
    for count, step in enumerate(denoise(lm.denoiser, before, sampler, row_keys=keys)):
        assert count < 200
        old = before if before.tokens.shape == step.canvas.tokens.shape and not before_left(before, step) else None
        if old is not None:
            was_fixed = ~(old.is_noise | old.is_draft)
            assert torch.equal(step.canvas.tokens[was_fixed], old.tokens[was_fixed])
            assert old.is_noise[step.is_committed].all()
        before = step.canvas
    finals, _ = run(lm, sampler, prompts)
    for (tokens, status), row in zip(finals, prompts, strict=True):
        assert tokens[: len(row)] == row
        new = [t for t, s in zip(tokens[len(row) :], status[len(row) :], strict=True) if s == Status.COMMITTED]
        assert MASK not in new
        ended = isinstance(sampler.stop, p.EndOfSequence) and 1 in new
        assert ended or len(new) == NEW


def before_left(before, step):
    return len(before.tokens) != len(step.rows)


@pytest.mark.slow
@few
@given(chosen=choices, prompts=st.lists(prompt, min_size=2, max_size=3, unique_by=tuple), order=st.randoms())
def test_a_row_is_as_it_is_alone(lm, chosen, prompts, order):
    sampler = sampler_of(lm, **chosen)
    alone = [run(lm, sampler, [row]) for row in prompts]
    shuffled = list(range(len(prompts)))
    order.shuffle(shuffled)
    finals, forwards = run(lm, sampler, [prompts[i] for i in shuffled])
    assert finals == [alone[i][0][0] for i in shuffled]
    assert forwards == [alone[i][1][0] for i in shuffled]


REOPENED = {  # a step asks nothing, and reopens what the forward before it had been fed
    "both": p.Remasking(kind="cap", eta=0.3), "unmask": p.Quota(), "edit": None, "steps": 10,
    "frontier": p.Blocks(size=4), "score": p.confidence, "stop": p.filled, "temperature": 0.0, "cfg_scale": 0.0,
    "cache": 0,
}  # fmt: skip


@few
@given(chosen=choices, row=prompt, budget=st.sampled_from([None, 7]))
@example(chosen=REOPENED, row=[34, 32, 2, 0], budget=None)
def test_forwards_are_those_that_the_model_ran(lm, chosen, row, budget):
    calls = []
    handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(None))
    sampler = replace(sampler_of(lm, **chosen), forwards=budget)
    _, forwards = run(lm, sampler, [row])
    handle.remove()
    assert forwards == [len(calls)]


@pytest.mark.slow
@few
@given(chosen=choices, prompts=st.lists(prompt, min_size=1, max_size=3), copies=st.integers(1, 2))
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_exact_cache_changes_nothing(layout, dtype, tolerance, chosen, prompts, copies):
    lm = tiny_lm(**LAYOUTS[layout], dtype=dtype)
    sampler = sampler_of(lm, **chosen | {"cache": 0})
    canvas, keys = start(prompts * copies)  # equal prompts are fed once
    cached = denoise(lm.denoiser, canvas, replace(sampler, cache="exact"), row_keys=keys)
    for a, b in zip(cached, denoise(lm.denoiser, canvas, sampler, row_keys=keys), strict=True):
        assert torch.equal(a.canvas.tokens, b.canvas.tokens)
        assert (a.confidence - b.confidence).abs().max() < tolerance


@few
@given(chosen=choices, row=prompt, forwards=st.integers(1, 13))
def test_a_budget_of_forwards_is_kept(lm, chosen, row, forwards):
    sampler = replace(sampler_of(lm, **chosen), forwards=forwards, stop=p.filled)
    finals, taken = run(lm, sampler, [row])
    assert taken[0] <= forwards
    assert MASK not in finals[0][0][len(row) :]


def confidences(lm, sampler, row):
    canvas, keys = start([row])
    return torch.cat([step.confidence for step in denoise(lm.denoiser, canvas, sampler, row_keys=keys)])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_approximate_cache_is_told_apart_unless_every_step_opens_a_block(cache):
    lm, row = tiny_lm(), [5, 6, 7, 8]
    sampler = Sampler(steps=NEW, frontier=p.Blocks(size=4), cache=cache)
    uncached = confidences(lm, replace(sampler, cache="none"), row)
    assert (confidences(lm, sampler, row) - uncached).abs().max() > 1e-3
    sampler = replace(sampler, steps_per_block=1)
    uncached = confidences(lm, replace(sampler, cache="none"), row)
    assert (confidences(lm, sampler, row) - uncached).abs().max() < 1e-10


def test_caches_that_do_not_fit_the_attention_are_refused():
    for lm, cache in ((tiny_lm(), "exact"), (tiny_lm(block_size=4), "dual")):
        with pytest.raises(ValueError, match=f"cache '{cache}'"):
            run(lm, Sampler(steps=4, cache=cache), [[5]])
