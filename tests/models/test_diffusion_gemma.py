"""DiffusionGemma behind our denoiser, and its sampler through our loop, against transformers' own."""

from dataclasses import replace

import pytest
import torch
from tiny_gemma import CANVAS, VOCAB, own_generate, tiny_gemma

import redraft
from redraft.models.encoder_decoder import EncoderDecoder
from redraft.models.families import find_family
from redraft.models.query import Query, SelfConditioning
from redraft.models.settings import DiffusionSettings
from redraft.prompts import row_keys
from redraft.sampling.batch import denoise
from redraft.sampling.canvas import Status, build_canvas
from redraft.sampling.config import SamplingConfig
from redraft.sampling.sampler import build_sampler

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # their generate

SETTINGS = DiffusionSettings(mask_token_id=0, process="uniform", block_size=CANVAS)


@pytest.fixture(scope="module")
def model():
    return tiny_gemma()


def language_model(model, **options):
    return redraft.LanguageModel(denoiser=EncoderDecoder(model, SETTINGS), **options)


def draw(*shape, seed=0):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def canvas_logits(denoiser, rows, *, previous=None):
    """Predict the last CANVAS positions of each row; rows are padded on the right."""
    lengths = [len(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    segments = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    where = torch.cat([i * padded.shape[1] + torch.arange(n - CANVAS, n) for i, n in enumerate(lengths)])
    with torch.no_grad():
        query = Query(
            input_ids=padded, where=where, segment_ids=segments.long(), previous=previous,
            grid_origin=torch.tensor(lengths) - CANVAS,
        )  # fmt: skip
        flat = denoiser(query)
    return flat.view(len(rows), CANVAS, VOCAB)


def own_logits(model, row, *, previous=None):
    prompt, canvas = row[None, :-CANVAS], row[None, -CANVAS:]
    with torch.no_grad():
        return model(input_ids=prompt, decoder_input_ids=canvas, self_conditioning_logits=previous).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [5, 64])
def test_logits_equal_the_models_own_forward(attention, window):
    model = tiny_gemma(attention=attention, window=window, sharpness=1.0)  # eager softmax is float32: not too sharp
    denoiser = EncoderDecoder(model, SETTINGS)
    rows = [draw(n + CANVAS, seed=n) for n in (9, 3, 14)]
    ours = canvas_logits(denoiser, rows)
    for row, logits in zip(rows, ours, strict=True):
        assert torch.allclose(logits, own_logits(model, row), atol=1e-5)
    told = SelfConditioning(torch.randn(3, CANVAS, VOCAB, dtype=torch.float64), torch.tensor([True, False, True]))
    conditioned = canvas_logits(denoiser, rows, previous=told)
    for i, row in enumerate(rows):
        previous = told.logits[i : i + 1] if told.is_present[i] else None
        assert torch.allclose(conditioned[i], own_logits(model, row, previous=previous), atol=1e-5)
    assert not torch.allclose(conditioned[0], ours[0], atol=1e-2)
    assert torch.allclose(conditioned[1], ours[1], atol=1e-6)


def test_every_canvas_of_a_row_is_predicted_from_the_clean_row_before_it(model):
    ids = draw(1, 3 * CANVAS)
    logits = language_model(model).logits(ids)
    for start in (CANVAS, 2 * CANVAS):
        expected = own_logits(model, ids[0, : start + CANVAS])
        assert torch.allclose(logits[0, start : start + CANVAS], expected, atol=1e-6)
    changed = ids.clone()
    changed[0, CANVAS - 1] = (ids[0, CANVAS - 1] + 1) % VOCAB  # the first canvas attends to its end
    assert not torch.allclose(language_model(model).logits(changed)[0, 0], logits[0, 0], atol=1e-3)


PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3, 9, 8], [20]]


def generated(lm, prompts, *, confident=0.005, **settings):
    """Generate as the preset does, with another threshold of confidence; return tokens and steps of each row."""
    config = SamplingConfig(preset="diffusion-gemma", **settings)
    sampler = build_sampler(config, lm.denoiser.settings)
    renoise = replace(sampler.revise, confident=confident)
    sampler = replace(sampler, unmask=renoise.unmask, revise=renoise)
    rows = [torch.tensor(prompt + [0] * config.max_new_tokens) for prompt in prompts]
    is_noise = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts, strict=True)]
    canvas = build_canvas(rows, is_noise, noise_token_id=0)
    keys = row_keys([torch.tensor(prompt) for prompt in prompts], seed=config.seed)
    tokens, steps = [[]] * len(rows), [0] * len(rows)
    for step in denoise(lm.denoiser, canvas, sampler, row_keys=keys):
        for place, row in enumerate(step.rows.tolist()):
            new = step.canvas.status[place] == Status.COMMITTED
            tokens[row], steps[row] = step.canvas.tokens[place, new].tolist(), int(step.age[place]) + 1
    return tokens, steps


@pytest.mark.parametrize(
    ("confident", "bound", "cache"), [(0.005, 0.1, "exact"), (0.5, 2.0, "exact"), (0.5, 2.0, "none")]
)
def test_our_loop_takes_the_steps_of_transformers_generate(model, confident, bound, cache):
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

    lm = language_model(model)
    chosen = {"max_new_tokens": 3 * CANVAS, "steps_per_block": 12, "entropy_bound": bound, "seed": 3, "stop": None}
    tokens, steps = generated(lm, PROMPTS, confident=confident, cache=cache, **chosen)
    theirs = [
        own_generate(
            model, prompt, seed=3, max_new_tokens=3 * CANVAS, max_denoising_steps=12, confidence_threshold=confident,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=bound),
        )
        for prompt in PROMPTS
    ]  # fmt: skip
    assert tokens == [new for new, _ in theirs]
    assert steps == [num for _, num in theirs]
    assert max(steps) <= 36
    assert confident < 0.5 or min(steps) < 20  # the adaptive stop is what ended canvases


@pytest.mark.slow
def test_generation_with_the_defaults_of_transformers_is_the_preset(model):
    lm = language_model(model)
    out = lm.generate(PROMPTS[1], preset="diffusion-gemma", max_new_tokens=2 * CANVAS, stop=None)
    assert (out.tokens[0].tolist(), out.forwards[0]) == own_generate(model, PROMPTS[1], max_new_tokens=2 * CANVAS)
    other = lm.generate(PROMPTS[1], preset="diffusion-gemma", max_new_tokens=2 * CANVAS, stop=None, seed=1)
    assert not torch.equal(other.tokens[0], out.tokens[0])


def test_a_budget_of_forwards_is_kept_canvas_by_canvas(model):
    lm = language_model(model)
    out = lm.generate(PROMPTS[1], preset="diffusion-gemma", max_new_tokens=3 * CANVAS, forwards=7, stop=None)
    expected, steps = own_generate(model, PROMPTS[1], max_new_tokens=3 * CANVAS, max_denoising_steps=2)
    assert (out.tokens[0].tolist(), out.forwards[0]) == (expected, steps)
    with pytest.raises(ValueError, match="one canvas after the other; allow at least one forward for each"):
        lm.generate(PROMPTS[1], preset="diffusion-gemma", max_new_tokens=3 * CANVAS, forwards=2)


def test_equal_prompts_share_their_context_and_draw_apart(model):
    lm = language_model(model)
    chosen = {"preset": "diffusion-gemma", "max_new_tokens": 2 * CANVAS, "steps_per_block": 4, "stop": None}
    first, second = lm.generate(PROMPTS[1], num_samples=2, **chosen).tokens
    assert torch.equal(first, lm.generate(PROMPTS[1], **chosen).tokens[0])
    assert not torch.equal(first, second)


def test_an_eos_ends_the_row_with_its_canvas(model):
    short = {"preset": "diffusion-gemma", "max_new_tokens": 18, "steps_per_block": 6}
    plain = language_model(model).generate(PROMPTS[0], stop=None, **short)
    eos = int(plain.tokens[0][CANVAS + 1])
    lm = language_model(model, eos_token_ids=(eos,))
    out = lm.generate(PROMPTS[0], **short)
    theirs, steps = own_generate(model, PROMPTS[0], max_new_tokens=18, max_denoising_steps=6, eos_token_id=eos)
    new = out.tokens[0].tolist()
    assert new[-1] == eos
    assert theirs[: len(new)] == new
    assert set(theirs[len(new) :]) <= {0}
    assert out.forwards[0] == steps


def test_a_length_between_two_canvases_is_cut_from_whole_ones(model):
    lm = language_model(model)
    chosen = {"preset": "diffusion-gemma", "steps_per_block": 6, "stop": None}
    long = lm.generate(PROMPTS[0], max_new_tokens=2 * CANVAS, **chosen).tokens[0]
    short = lm.generate(PROMPTS[0], max_new_tokens=CANVAS + 2, **chosen).tokens[0]
    assert torch.equal(short, long[: CANVAS + 2])


def test_a_saved_checkpoint_loads_as_its_family_and_needs_no_flags(tmp_path):
    model = tiny_gemma(dtype=torch.float32)
    model.save_pretrained(tmp_path / "stock")
    lm = redraft.load(tmp_path / "stock", device="cpu")
    assert type(lm.model) is type(model)
    assert lm.denoiser.settings == SETTINGS
    assert lm.saved_sampling == find_family({}, name="diffusion-gemma").generation
    assert (lm.context_length, lm.eos_token_ids) == (256, (1,))
    row = draw(9 + CANVAS)
    assert torch.allclose(canvas_logits(lm.denoiser, [row])[0], own_logits(model, row), atol=1e-5)
    lm.model.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50]}')
    again = redraft.load(tmp_path / "again", device="cpu")
    assert again.eos_token_ids == (1, 106, 50)
    assert again.denoiser.settings == SETTINGS
    prompt, short = [5, 6, 7], {"max_new_tokens": CANVAS, "steps_per_block": 3}
    assert torch.equal(again.generate(prompt, **short).tokens[0], lm.generate(prompt, **short).tokens[0])


def test_what_it_cannot_do_is_told(model, tmp_path):
    lm = language_model(model)
    for call, message in {
        lambda: lm.generate([3], preset="llada", max_new_tokens=6): "trained on uniform noise",
        lambda: lm.generate([3], preset="diffusion-gemma", cfg_scale=1.0): "no unconditional branch; got cfg_scale=1.0",
        lambda: lm.infill([[3, 0, 5]], preset="diffusion-gemma"): "it cannot fill holes",
        lambda: lm.denoiser.inputs(Query.everywhere(draw(1, 6))): "not trained or scored",
        lambda: lm.logits(draw(1, 6), layout="full"): "one canvas at a time",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    tiny_gemma(dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is an encoder-decoder; it can be neither checked nor converted"):
        redraft.convert(tmp_path / "model", tmp_path / "out")
