"""Thinking: cached equals uncached, rows are independent, the dials do what they say."""

from dataclasses import replace

import pytest
import torch
from tiny_thinker import tiny_thinker

from redraft.latent.objective import answer_input, prompt_tokens
from redraft.latent.repulsion import push_apart
from redraft.latent.sequence import Latents
from redraft.latent.solvers import solve, solver_from_name
from redraft.latent.thinking import ThinkingConfig, _Run
from redraft.latent.thought import Thought, TrainOfThought, vote
from redraft.layouts import two_copy_mask

PROMPTS = ["1 2 3", "4 5 6 7 8"]


def same(a, b):
    return len(a.thoughts) == len(b.thoughts) and all(
        torch.allclose(x.latents, y.latents, atol=1e-9) for x, y in zip(a.thoughts, b.thoughts, strict=True)
    )


def forward_without_cache(thinker, prompt, clean, *, noisy=None, answer=None, is_withheld=False):
    """One pass over [prompt | answer | clean blocks | noisy block], in the layout of training."""
    model = thinker.denoiser
    ids = torch.tensor([thinker.tokenizer(prompt)["input_ids"]])
    if is_withheld:  # a withheld prompt is as long as the longest, whatever it was
        ids = torch.zeros(1, model.config.prompt_tokens, dtype=torch.int64)
    tokens, _ = prompt_tokens(ids, torch.full((1,), is_withheld), torch.ones_like(ids, dtype=torch.bool))
    order = torch.zeros_like(ids)
    if answer is not None:
        index = torch.arange(answer.shape[1])[None]
        tokens = tokens.with_answer(answer, model.config.answer_position + index)
        is_autoregressive = model.config.answer == "autoregressive"
        order = torch.cat([order, model.config.max_blocks + 1 + (index if is_autoregressive else 0 * index)], dim=1)
    z, guess, t = (clean[:, :0], clean[:, :0], clean[:, :0, 0]) if noisy is None else noisy
    number = torch.arange(1, 1 + (clean.shape[1] + z.shape[1]) // 2)
    latents = Latents(
        z_t=torch.cat([clean, z], 1), x_0=torch.cat([clean, guess], 1), t=torch.cat([0 * clean[..., 0], t], 1),
        positions=model.config.latent_positions(number).flatten()[None],
    )  # fmt: skip
    block = torch.cat([order, number.repeat_interleave(2)[None]], dim=1)
    mask = two_copy_mask(block, torch.zeros_like(block), is_valid=torch.ones_like(block, dtype=torch.bool))
    with torch.no_grad():
        return model(tokens, latents, mask)


def x_0_without_cache(thinker, prompt, clean, z, guess, t, *, cfg):
    """Estimate the block after the clean ones; guided: with and without the prompt, extrapolated."""
    model, noisy = thinker.denoiser, (z, guess, t.double().expand(z.shape[:2]))
    found = []
    for is_withheld in (False, True):
        hidden = forward_without_cache(thinker, prompt, clean, noisy=noisy, is_withheld=is_withheld)
        found.append(model.config.process.predict_x_0(model.out(hidden.latents[:, -2:]), z, noisy[2]).detach())
    with_prompt, without = found
    return without + cfg * (with_prompt - without)


@pytest.mark.parametrize(
    "settings",
    [{"solver": solver} for solver in ("ddim", "dpm++2m", "heun", "ancestral")] + [{"cfg": 2.0}, {"init_noise": 0.5}],
)
def test_cached_equals_uncached(settings):
    thinker = tiny_thinker()
    ((sample,), _) = thinker.think(PROMPTS, steps=3, force_blocks=True, **settings)
    run = _Run(thinker, PROMPTS[:1], ThinkingConfig(steps=3), is_traced=False)  # for its noise
    done = torch.zeros(1, 0, 4, dtype=torch.float64)
    for block, thought in enumerate(sample.thoughts, start=1):
        guess = [torch.zeros(1, 2, 4, dtype=torch.float64)]

        def estimate(z, t, guess=guess, done=done):
            cfg = settings.get("cfg", 1.0)
            guess.append(x_0_without_cache(thinker, PROMPTS[0], done, z, guess[-1], t, cfg=cfg))
            return guess[-1]

        path, solver = thinker.denoiser.config.process.schedule, solver_from_name(settings.get("solver", "dpm++2m"))
        noise = lambda i, block=block: run._noise(block, i + 1)  # noqa: E731
        start = settings.get("init_noise", 1.0) * run._noise(block, 0)
        z = solve(solver, path, estimate, start, path.even_times(3), noise=noise)
        assert torch.allclose(z[0], thought.latents, atol=1e-9)
        done = torch.cat([done, thought.latents[None]], dim=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("answer", ["autoregressive", "masked"])
def test_cached_answers_equal_uncached_ones_over_prompt_and_thoughts(answer, seed):
    """Token by token, or the surest of the open places first."""
    thinker = tiny_thinker(answer=answer, seed=seed)
    config, count = thinker.denoiser.config, thinker.denoiser.config.answer_tokens
    for prompt, (sample,) in zip(PROMPTS, thinker.think(PROMPTS, steps=3, force_blocks=True), strict=True):
        clean = torch.cat([thought.latents[None] for thought in sample.thoughts], dim=1)

        def logits(ids, prompt=prompt, clean=clean):
            hidden = forward_without_cache(thinker, prompt, clean, answer=ids).tokens[:, -count:]
            return thinker.denoiser.token_logits(hidden)[0]

        if answer == "autoregressive":
            written = []
            for place in range(count):
                told = torch.tensor([[*written, *[0] * (count - place)]])
                ids, positions, _, _ = answer_input(thinker.denoiser, told[:, :count], u=torch.zeros(1, count + 1))
                assert positions.tolist() == [[config.answer_position + place for place in range(count)]]
                written.append(int(logits(ids)[place].argmax()))
        else:
            written = [config.mask_token_id] * count
            for _ in range(count):
                found = logits(torch.tensor([written]))
                found[:, config.mask_token_id] = -torch.inf
                sure, best = found.softmax(-1).max(-1)
                place = max((p for p in range(count) if written[p] == config.mask_token_id), key=lambda p: sure[p])
                written[place] = int(best[place])
        end = written.index(config.eos_token_id) if config.eos_token_id in written else count
        assert thinker.tokenizer.decode(written[:end], skip_special_tokens=True) == sample.answer


@pytest.mark.parametrize(
    "settings", [{}, {"cfg": 2.0}, {"early_exit": True, "steps": 8}, {"revise": 1, "cfg": 1.5}, {"solver": "ancestral"}]
)
@pytest.mark.parametrize("answer", ["autoregressive", "masked"])
def test_a_row_is_what_it_would_be_alone(settings, answer):
    thinker = tiny_thinker(answer=answer)
    together = thinker.think(PROMPTS, samples=2, **{"steps": 3, **settings})
    for prompt, samples in zip(PROMPTS, together, strict=True):
        (alone,) = thinker.think(prompt, samples=1, **{"steps": 3, **settings})
        assert same(alone[0], samples[0])
        assert alone[0].answer == samples[0].answer
        assert alone[0].forwards == samples[0].forwards
        assert not same(samples[0], samples[1])


def test_forwards_are_counted_per_row():
    thinker = tiny_thinker()
    for solver, per_block in (("ddim", 4), ("heun", 7), ("midpoint", 8)):
        ((sample,),) = thinker.think("1 2", steps=4, solver=solver, force_blocks=True)
        assert sample.forwards == 3 * (per_block + 1) + 3  # commits, and an answer of three tokens
        assert sample.stop == "blocks"


def test_the_stop_head_ends_the_thoughts():
    thinker = tiny_thinker()
    with torch.no_grad():
        thinker.denoiser.stop.bias.fill_(1e6)
    ((sample,),) = thinker.think("1 2", steps=2)
    assert (len(sample.thoughts), sample.stop) == (1, "stop head")


def test_the_trace_shows_every_step_and_early_exit_saves_some():
    thinker = tiny_thinker()
    ((full,),) = thinker.think("1 2", steps=12, trace=True, force_blocks=True)
    assert [estimate.t for estimate in full.thoughts[0].steps] == pytest.approx([1 - i / 12 for i in range(12)])
    assert all(thought.steps[-1].text == thought.text for thought in full.thoughts)
    assert torch.allclose(full.thoughts[2].steps[-1].latents, full.thoughts[2].latents)  # the last step goes to t = 0
    with torch.no_grad():
        thinker.autoencoder.encoder.embed.weight.zero_()  # now every estimate decodes to the same text
    ((early,),) = thinker.think("1 2", steps=12, trace=True, early_exit=True, force_blocks=True)
    assert [len(thought.steps) for thought in early.thoughts] == [3, 3, 3]
    assert full.forwards - early.forwards == 3 * 9


@pytest.mark.parametrize(("solver", "asked"), [("ddim", 1), ("heun", 2), ("midpoint", 2), ("ancestral", 1)])
def test_early_exit_compares_steps_and_not_estimates(solver, asked, monkeypatch):
    thinker = tiny_thinker(max_blocks=1)
    monkeypatch.setattr(type(thinker.autoencoder), "decode", lambda self, z: torch.zeros(len(z), 2).long())
    ((sample,),) = thinker.think("1 2", steps=12, trace=True, early_exit=True, solver=solver)
    assert len(sample.thoughts[0].steps) == 2 * asked + 1  # the start of the third step is the second like the first


def test_eta_of_ancestral_leads_from_ddim_to_all_its_noise():
    thinker = tiny_thinker()
    settings = {"steps": 4, "force_blocks": True}

    def latents(**more):
        ((sample,),) = thinker.think("1 2", **settings, **more)
        return sample.thoughts[0].latents

    assert torch.equal(latents(solver="ancestral", eta=0.0), latents(solver="ddim"))
    assert torch.equal(latents(solver="ancestral", eta=1), latents(solver="ancestral"))
    assert not torch.equal(latents(solver="ancestral", eta=0.5), latents(solver="ancestral"))
    assert torch.equal(latents(solver="churn", eta=0.5), latents(solver="churn"))


def test_guidance_of_one_changes_nothing_and_of_two_does():
    thinker = tiny_thinker()
    ((plain,),) = thinker.think("1 2", steps=3)
    ((near,),) = thinker.think("1 2", steps=3, cfg=1 + 1e-9)  # the guided path, without effect
    ((guided,),) = thinker.think("1 2", steps=3, cfg=2.0)
    assert torch.allclose(plain.thoughts[0].latents, near.thoughts[0].latents, atol=1e-6)
    assert not torch.allclose(plain.thoughts[0].latents, guided.thoughts[0].latents, atol=1e-3)


def test_repulsion_spreads_the_samples_of_a_prompt_and_leaves_other_prompts_alone():
    thinker = tiny_thinker()

    def spread(diversity, samples=4):
        samples = thinker.think(PROMPTS, samples=samples, steps=4, diversity=diversity, blocks=1)[0]
        return torch.pdist(torch.stack([s.thoughts[0].latents.flatten() for s in samples])).mean()

    assert spread(0.5) > 1.05 * spread(0.0)
    assert spread(0.5, samples=2) > 1.05 * spread(0.0, samples=2)
    (alone,) = thinker.think(PROMPTS[1], samples=4, steps=4, diversity=0.5)
    together = thinker.think(PROMPTS, samples=4, steps=4, diversity=0.5)[1]
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_samples_that_have_stopped_or_are_elsewhere_repel_nobody():
    z, together = torch.randn(4, 2, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    moved = z.clone()
    moved[3] += 9.0
    assert not torch.allclose(push_apart(z, together, samples=4)[:3], push_apart(moved, together, samples=4)[:3])
    for place in ([0, 0, 0, -1], [0, 0, 0, 2]):  # stopped; revising another block
        found = [push_apart(each, torch.tensor(place), samples=4) for each in (z, moved)]
        assert torch.equal(*found)
        assert not found[0][3].any()
    assert torch.allclose(push_apart(z[:3], together[:3], samples=3), found[0][:3])


def test_noise_prediction_thinks_finite_thoughts():
    ((sample,),) = tiny_thinker(parametrization="eps").think("1 2", steps=4)
    assert all(torch.isfinite(thought.latents).all() for thought in sample.thoughts)


def test_revision_changes_the_least_stable_block_alone():
    thinker = tiny_thinker()
    ((before,),) = thinker.think("1 2", steps=4, force_blocks=True)
    ((after,),) = thinker.think("1 2", steps=4, force_blocks=True, revise=1)
    least = max(range(3), key=lambda b: before.thoughts[b].instability)
    changed = [not torch.equal(before.thoughts[b].latents, after.thoughts[b].latents) for b in range(3)]
    assert changed == [b == least for b in range(3)]


def test_a_revision_sees_what_was_committed_and_not_what_was_thought():
    thinker, seen = tiny_thinker(), []

    def watch(module, inputs):
        latents = inputs[1]
        seen.append(latents.z_t[latents.t == 0])

    with torch.no_grad():
        thinker.denoiser.register_forward_pre_hook(watch)
        thinker.think("1 2", steps=3, force_blocks=True, revise=2, intervene=lambda block, z: torch.zeros_like(z))
    assert not torch.cat(seen).any()


def test_a_revision_does_not_change_why_the_thoughts_ended(monkeypatch):
    thinker, ends = tiny_thinker(), iter([-1.0, 1.0, -1.0, -1.0])  # after the second block; never, once revised
    monkeypatch.setattr(thinker.denoiser, "stop_logit", lambda hidden: torch.full((len(hidden),), next(ends)))
    ((sample,),) = thinker.think("1 2", steps=2, revise=1)
    assert (len(sample.thoughts), sample.stop) == (2, "stop head")


def test_what_was_never_trained_for_is_refused():
    with pytest.raises(ValueError, match=r"never trained without a prompt, as guidance needs; got cfg 2.0"):
        tiny_thinker(can_guide=False).think("1", cfg=2.0)
    with pytest.raises(ValueError, match=r"trained without steps of revision; got revise 1"):
        tiny_thinker(can_revise=False).think("1", revise=1)


def test_what_is_committed_can_be_intervened_in():
    thinker = tiny_thinker()
    ((plain,),) = thinker.think("1 2", steps=3, force_blocks=True)
    ((zeroed,),) = thinker.think("1 2", steps=3, force_blocks=True, intervene=lambda block, z: torch.zeros_like(z))
    assert torch.equal(plain.thoughts[0].latents, zeroed.thoughts[0].latents)  # made before anything was committed
    assert not torch.allclose(plain.thoughts[1].latents, zeroed.thoughts[1].latents)


def test_a_vote_takes_the_commonest_answer_or_the_first_verified():
    samples = [TrainOfThought(thoughts=[], answer=a, forwards=1, stop="blocks") for a in ("x", "y", "z", "y")]
    assert vote(samples).answer == "y"
    assert vote(samples, verify=lambda sample: sample.answer == "z").answer == "z"
    assert vote(samples, verify=lambda sample: False).answer == "y"
    thought = Thought(latents=torch.zeros(1, 1), text="a", steps=[], instability=0.0)
    assert vote([replace(samples[0], answer="", thoughts=[thought])]).text == "a"
    with pytest.raises(ValueError, match="there is no sample to choose from"):
        vote([])


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("1", {"blocks": 0}, "blocks must be at least 1; got 0"),
        ("1", {"steps": 0}, "steps must be at least 1; got 0"),
        ("1", {"samples": 0}, "samples must be at least 1"),
        ("1", {"blocks": 9}, "blocks must be at most the 3 the model was built for; got 9"),
        ("1", {"seed": 2**70}, "seed must lie in"),
        ("1", {"solver": "euler"}, "unknown solver 'euler'"),
        ("1", {"step": 3}, "unknown setting 'step'.*Did you mean 'steps'"),
        ("1", {"cfg": -1.0}, "cfg must not be negative"),
        ("1", {"init_noise": 0.0}, "init_noise must be positive and finite; got 0.0. 1 is usual"),
        ("1", {"revise_t": 0.0}, "revise_t must be in .0, 1.; got 0.0"),
        ("1", {"eta": 0.5}, "eta is the noise of ancestral and churn; got eta 0.5 for dpm"),
        ("1", {"eta": 1.5, "solver": "ancestral"}, "eta must be in .0, 1.; got 1.5"),
        ("1 2 3 4 5 6", {}, "a prompt must have 1 to 5 tokens, as in training; got 6"),
        ("1 zwei", {}, "'zwei' is no word of this model"),
        ([], {}, "there is no prompt"),
    ],
)
def test_mistakes_are_told(prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_thinker().think(prompt, **settings)
