import math

import pytest
import torch

from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder, gate_failures, measure_gate

KINDS = {"chunk": {}, "resampler": {"encoder_config": True, "num_layers": 1}}


def tiny(kind, **settings):
    from transformers import BertConfig

    torch.manual_seed(0)
    extra = dict(KINDS[kind])
    if extra.pop("encoder_config", None):
        encoder = BertConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
        )
        extra["encoder_config"] = encoder.to_dict()
    shape = {"vocab_size": 12, "block_tokens": 3, "latent_dim": 8, "hidden_size": 32, "num_layers": 0}
    return TextAutoencoder(AutoencoderConfig(**{**shape, "kind": kind, **extra, **settings}))


def blocks(count=40, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 12, (count, 3), generator=generator)
    mask = torch.arange(3) < torch.randint(1, 4, (count, 1), generator=generator)
    return ids * mask, mask


def losses(model, ids, mask, *, noise=0.0):
    size = (len(ids), model.config.num_latents, model.config.latent_dim)
    return model(ids, mask, noise * torch.randn(size), torch.randn(size))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_saves_and_comes_back_with_its_normaliser(kind, tmp_path):
    model, (ids, mask) = tiny(kind), blocks()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (kind == "resampler")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first, last = None, None
    for _ in range(40):
        nats, kl = losses(model, ids, mask)
        (nats + 1e-4 * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = first or float(nats.detach()), float(nats.detach())
    assert last < 0.7 * first
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    model.eval().fit_normalizer(ids, mask)
    latents = model.encode_normalized(ids, mask)
    assert torch.allclose(latents.mean(0), torch.zeros(()), atol=1e-4)
    assert torch.allclose(latents.std(0), torch.ones(()), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = TextAutoencoder.from_pretrained(tmp_path).eval()
    assert torch.allclose(again.encode_normalized(ids, mask), latents, atol=1e-6)
    assert torch.equal(again.decode(latents), model.decode(latents))


def test_padding_does_not_reach_the_latents_of_a_resampler():
    model, (ids, mask) = tiny("resampler").eval(), blocks()
    other = torch.where(mask, ids, 7)
    assert torch.allclose(model.encode(ids, mask)[0], model.encode(other, mask)[0], atol=1e-6)


def test_a_frozen_encoder_kept_in_bfloat16_is_used_in_float32(tmp_path):
    from transformers import BertConfig, BertModel

    shape = BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    BertModel(shape).to(torch.bfloat16).save_pretrained(tmp_path)
    model = tiny("resampler", encoder=str(tmp_path), encoder_config=None)
    model.fit_normalizer(*blocks())
    model.save_pretrained(tmp_path / "saved")
    again = TextAutoencoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode_normalized(*blocks()), model.encode_normalized(*blocks()))


def test_noise_on_latents_is_relative_to_their_spread():
    """Larger latents change nothing, so that they do not grow to drown the noise."""
    model, (ids, mask) = tiny("chunk").eval(), blocks()
    seen = []
    model.logits = lambda z: seen.append(z) or torch.zeros(*ids.shape, 12)
    encode = model.encode
    for scale in (1.0, 100.0):
        model.encode = lambda ids, mask, scale=scale: (scale * encode(ids, mask)[0], torch.full((40, 2, 8), -40.0))
        torch.manual_seed(0)
        losses(model, ids, mask, noise=1.0)
    assert torch.allclose(seen[1], 100 * seen[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("local", [False, True])
def test_an_untrained_linear_code_brings_blocks_back(local):
    """Its decoder starts as the transpose of its encoder, and words as what tells them apart."""
    torch.manual_seed(0)
    shape = {"vocab_size": 200, "block_tokens": 4, "latent_dim": 32, "num_layers": 0, "local": local}
    model = TextAutoencoder(AutoencoderConfig(**shape)).eval()
    ids = torch.randint(0, 200, (64, 4))
    model.fit_normalizer(ids, torch.ones_like(ids, dtype=torch.bool))
    assert measure_gate(model, ids, torch.ones_like(ids, dtype=torch.bool), [0.0])["0"] > 0.5


@torch.no_grad()
def test_a_local_vector_starts_with_tokens_of_its_own_and_learns_of_the_others():
    model = tiny("chunk", block_tokens=4, num_latents=2, num_layers=0, local=True)
    ids = torch.randint(1, 12, (8, 4), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 2:] = (ids[:, 2:] + 1) % 12  # the second vector's
    mask = torch.ones_like(ids, dtype=torch.bool)
    before, after = model.encode(ids, mask)[0], model.encode(other, mask)[0]
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1] - after[:, 1]).norm(dim=-1).min() > 0.1
    with torch.enable_grad():
        losses(model, ids, mask)[0].backward()
    across = model.encoder.mlp.into.weight.grad.unflatten(0, (2, -1)).unflatten(2, (2, -1))[0, :, 1]
    assert across.norm() > 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "widths that 2 divides; got .3, 32."),
        ({"num_latents": 3}, "widths that 3 divides; got .3, 32."),
        ({"kind": "resampler", "block_tokens": 4}, "local needs kind chunk"),
    ],
)
def test_what_cannot_be_local_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny(**{"kind": "chunk", "local": True, **settings})


def test_the_gate_measures_exact_blocks_at_relative_noise():
    model, (ids, mask) = tiny("chunk").eval(), blocks()
    model.fit_normalizer(ids, mask)
    latents, codes = model.encode_normalized(ids, mask), ids

    def nearest(z):
        return codes[torch.cdist(z.flatten(1), latents.flatten(1)).argmin(1)]

    model.decode = nearest  # a perfect decoder
    gate = measure_gate(model, ids, mask, [0.0, 50.0])
    assert gate["0"] == 1.0
    assert gate["50"] < 0.5
    assert list(measure_gate(model, ids, mask)) == ["0", "0.1", "0.25", "0.5", "0.75"]


def test_a_gate_that_was_missed_or_never_measured_is_told():
    assert gate_failures({"0": 1.0, "0.25": 0.96}) == []
    assert gate_failures({"0": 1.0, "0.25": 0.9}) == ["90.0 % of blocks exact at noise 0.25 (wanted 95 %)"]
    assert len(gate_failures(None)) == 2
    assert len(gate_failures({"0": math.nan, "0.25": math.nan})) == 2


def test_the_normaliser_of_a_single_block_is_finite():
    model = tiny("chunk")
    model.fit_normalizer(*blocks(1))
    assert torch.isfinite(model.encode_normalized(*blocks(1))).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TextAutoencoder(AutoencoderConfig(kind="thought")), "unknown autoencoder 'thought'; known are chunk"),
        (lambda: tiny("chunk", num_layers=2), "chunk is linear now; got num_layers=2, of an MLP. Train it again."),
        (lambda: tiny("chunk", hidden_size=3), "hidden_size must be a multiple of 4 for chunk; got 3"),
        (lambda: tiny("resampler", hidden_size=200), "hidden_size must be a multiple of 6 for resampler; got 200"),
        (lambda: TextAutoencoder(AutoencoderConfig(kind="resampler")), "needs encoder=, a folder or hub id"),
        (lambda: tiny("chunk").decode(torch.zeros(1, 2, 8)), "no normaliser; got scale 0"),
        (lambda: tiny("chunk").encode_normalized(*blocks()), "no normaliser"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
