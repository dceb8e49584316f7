"""Thinking: cached equals uncached, rows are independent, the dials do what they say."""

from dataclasses import replace

import pytest
import torch
from tiny_thinker import tiny_thinker

from redraft.latent.answers import write_answers
from redraft.latent.config import ThinkingConfig
from redraft.latent.objective import answer_input, prompt_tokens
from redraft.latent.sequence import LatentInputs
from redraft.latent.solvers import SOLVERS
from redraft.latent.thinking import Thought, TrainOfThought, _Run, choose_sample
from redraft.layouts import two_copy_mask
from redraft.schedules import FlowSchedule

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
        order = torch.cat([order, model.config.max_blocks + 1 + index], dim=1)
    z, guess, t = (clean[:, :0], clean[:, :0], clean[:, :0, 0]) if noisy is None else noisy
    number = torch.arange(1, 1 + (clean.shape[1] + z.shape[1]) // 2)
    latents = LatentInputs(
        z_t=torch.cat([clean, z], 1), x_0=torch.cat([clean, guess], 1), t=torch.cat([0 * clean[..., 0], t], 1),
        positions=model.config.latent_positions(number).flatten()[None],
    )  # fmt: skip
    block = torch.cat([order, number.repeat_interleave(2)[None]], dim=1)
    mask = two_copy_mask(block, torch.zeros_like(block), is_valid=torch.ones_like(block, dtype=torch.bool))
    with torch.no_grad():
        return model(tokens, latents, mask)


def x_0_without_cache(thinker, prompt, clean, z, guess, t, *, cfg_scale):
    """Estimate the block after the clean ones; guided: with and without the prompt, extrapolated."""
    model, noisy = thinker.denoiser, (z, guess, t.double().expand(z.shape[:2]))
    found = []
    for is_withheld in (False, True):
        hidden = forward_without_cache(thinker, prompt, clean, noisy=noisy, is_withheld=is_withheld)
        found.append(model.out(hidden.latents[:, -2:]).detach())
    with_prompt, without = found
    return without + (cfg_scale + 1) * (with_prompt - without)


@pytest.mark.parametrize(
    "settings",
    [{"solver": "ddim"}, {"solver": "dpm++2m"}, {"cfg_scale": 1.0}, {"init_noise": 0.5}],
)
def test_cached_equals_uncached(settings):
    thinker = tiny_thinker()
    ((sample,), _) = thinker.think(PROMPTS, steps=3, blocks=3, **settings)
    run = _Run(thinker, PROMPTS[:1], ThinkingConfig(steps=3), is_traced=False)  # for its noise
    times = FlowSchedule().grid(3)
    alphas, sigmas = FlowSchedule().alpha(times), FlowSchedule().sigma(times)
    done = torch.zeros(1, 0, 4, dtype=torch.float64)
    for block, thought in enumerate(sample.thoughts, start=1):
        guess = [torch.zeros(1, 2, 4, dtype=torch.float64)]

        def estimate(z, i, guess=guess, done=done):
            scale = settings.get("cfg_scale", 0.0)
            guess.append(x_0_without_cache(thinker, PROMPTS[0], done, z, guess[-1], times[i], cfg_scale=scale))
            return guess[-1]

        start = settings.get("init_noise", 1.0) * run._noise(block)
        z = SOLVERS[settings.get("solver", "dpm++2m")](estimate, start, alphas, sigmas)
        assert torch.allclose(z[0], thought.latents, atol=1e-9)
        done = torch.cat([done, thought.latents[None]], dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_cached_answers_equal_uncached_ones_over_prompt_and_thoughts(seed):
    thinker = tiny_thinker(seed=seed)
    config, count = thinker.denoiser.config, thinker.denoiser.config.answer_tokens
    for prompt, (sample,) in zip(PROMPTS, thinker.think(PROMPTS, steps=3, blocks=3), strict=True):
        clean = torch.cat([thought.latents[None] for thought in sample.thoughts], dim=1)
        written = []
        for place in range(count):
            ids, positions = answer_input(thinker.denoiser, torch.tensor([[*written, *[0] * (count - place)]]))
            assert positions.tolist() == [[config.answer_position + place for place in range(count)]]
            hidden = forward_without_cache(thinker, prompt, clean, answer=ids).tokens[0, -count:]
            written.append(int(thinker.denoiser.token_logits(hidden)[place].argmax()))
        end = written.index(config.eos_token_id) if config.eos_token_id in written else count
        assert thinker.tokenizer.decode(written[:end], skip_special_tokens=True) == sample.answer


def test_any_token_may_be_written_as_the_likeliest():
    """The loop never proposes the mask token of masked diffusion; an answer has none."""
    thinker = tiny_thinker()
    with torch.no_grad():
        thinker.denoiser.embed.weight[:3].mul_(30.0)
    run = _Run(thinker, PROMPTS, ThinkingConfig(steps=1), is_traced=False)
    assert set(write_answers(thinker.denoiser, run.cache).flatten().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 1.0}, {"solver": "ddim"}, {"blocks": 2}])
def test_a_row_is_what_it_would_be_alone(settings):
    thinker = tiny_thinker()
    together = thinker.think(PROMPTS, num_samples=2, **{"steps": 3, **settings})
    for prompt, samples in zip(PROMPTS, together, strict=True):
        (alone,) = thinker.think(prompt, **{"steps": 3, **settings})
        assert same(alone[0], samples[0])
        assert alone[0].answer == samples[0].answer
        assert alone[0].forwards == samples[0].forwards
        assert not same(samples[0], samples[1])


def test_forwards_are_counted_per_row():
    ((sample,),) = tiny_thinker().think("1 2", steps=4, blocks=3)
    assert sample.forwards == 3 * (4 + 1) + 3  # commits, and an answer of three tokens
    assert sample.stop == "blocks"


def test_the_stop_head_ends_the_thoughts():
    thinker = tiny_thinker()
    with torch.no_grad():
        thinker.denoiser.stop.bias.fill_(1e6)
    ((sample,),) = thinker.think("1 2", steps=2)
    assert (len(sample.thoughts), sample.stop) == (1, "stop head")
    ((sample,),) = thinker.think("1 2", steps=2, blocks=2)
    assert (len(sample.thoughts), sample.stop) == (2, "blocks")


def test_the_trace_shows_every_step():
    ((full,),) = tiny_thinker().think("1 2", steps=12, trace=True, blocks=3)
    assert [estimate.t for estimate in full.thoughts[0].steps] == pytest.approx([1 - i / 12 for i in range(12)])
    assert all(thought.steps[-1].text == thought.text for thought in full.thoughts)
    assert torch.allclose(full.thoughts[2].steps[-1].latents, full.thoughts[2].latents)  # the last step goes to t = 0


def test_guidance_of_nearly_zero_changes_nothing_and_of_one_does():
    thinker = tiny_thinker()
    ((plain,),) = thinker.think("1 2", steps=3)
    ((near,),) = thinker.think("1 2", steps=3, cfg_scale=1e-9)  # the guided path, without effect
    ((guided,),) = thinker.think("1 2", steps=3, cfg_scale=1.0)
    assert torch.allclose(plain.thoughts[0].latents, near.thoughts[0].latents, atol=1e-6)
    assert not torch.allclose(plain.thoughts[0].latents, guided.thoughts[0].latents, atol=1e-3)


def test_what_was_never_trained_for_is_refused():
    with pytest.raises(ValueError, match=r"never trained without a prompt; got cfg_scale 1.0"):
        tiny_thinker(can_guide=False).think("1", cfg_scale=1.0)


def test_what_is_committed_can_be_intervened_in():
    thinker = tiny_thinker()
    ((plain,),) = thinker.think("1 2", steps=3, blocks=3)
    ((zeroed,),) = thinker.think("1 2", steps=3, blocks=3, intervene=lambda block, z: torch.zeros_like(z))
    assert torch.equal(plain.thoughts[0].latents, zeroed.thoughts[0].latents)  # made before anything was committed
    assert not torch.allclose(plain.thoughts[1].latents, zeroed.thoughts[1].latents)


def test_a_vote_takes_the_commonest_answer_or_text():
    samples = [TrainOfThought(thoughts=[], answer=a, forwards=1, stop="blocks") for a in ("x", "y", "z", "y")]
    assert choose_sample(samples).answer == "y"
    thought = Thought(latents=torch.zeros(1, 1), text="a", steps=[])
    assert choose_sample([replace(samples[0], answer="", thoughts=[thought])]).text == "a"


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("1", {"blocks": 0}, r"blocks must lie in \[1, .*; got 0"),
        ("1", {"steps": 0}, r"steps must lie in \[1, .*; got 0"),
        ("1", {"num_samples": 0}, r"num_samples must lie in \[1, .*; got 0"),
        ("1", {"blocks": 9}, "blocks must be at most the 3 the model was built for; got 9"),
        ("1", {"seed": 2**70}, "seed must lie in"),
        ("1", {"step": 3}, "unknown setting 'step'.*Did you mean 'steps'"),
        ("1", {"cfg_scale": -1.0}, "cfg_scale must be at least 0; got -1"),
        ("1", {"init_noise": 0.0}, "init_noise must be positive and finite; got 0.0"),
        ("1 2 3 4 5 6", {}, "a prompt must have 1 to 5 tokens, as in training; got 6"),
        ("1 zwei", {}, "the model does not know the word 'zwei'"),
        ([], {}, "must be one or more prompts"),
    ],
)
def test_mistakes_are_told(prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_thinker().think(prompt, **settings)
