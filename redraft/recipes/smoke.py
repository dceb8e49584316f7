"""Shrink any recipe so that it runs in seconds and offline; its objective and data policy stay."""

from dataclasses import replace
from pathlib import Path

from redraft.latent.config import LatentRunConfig
from redraft.models.config import AdapterConfig, ModelConfig
from redraft.training.config import RunConfig, TrainConfig

SEQ_LEN = 128
CONVERSATIONS = Path(__file__).with_name("smoke.jsonl")  # 64 sums: read where they are, nothing is written


def smoke(config: RunConfig | LatentRunConfig) -> RunConfig | LatentRunConfig:
    """Shrink a run; objective, packing, EOS policy, decay and EMA stay. Random weights replace a start model
    and an adapter over it.

    What a start model brings besides weights is lost too: its tokenizer, and Dream's shift of the logits.
    """
    if isinstance(config, LatentRunConfig):
        start = config.start and f"{config.start}-smoke"
        few = _few_steps(config.train)  # too few for an autoencoder to pass its gate, so force=True
        return replace(config, out=f"{config.out}-smoke", start=start, force=True, train=few)
    if ":" in config.data.kind:  # rows that a function makes
        return replace(config, out=f"{config.out}-smoke", train=_few_steps(config.train))
    data, chat = config.data, config.data.chat
    is_chat = data.kind == "chat"
    eos_block = SEQ_LEN if chat.eos_block == data.seq_len else chat.eos_block
    data = replace(
        data,
        source=str(CONVERSATIONS) if is_chat else "stdlib",
        seq_len=SEQ_LEN,
        chat=replace(chat, eos_block=eos_block),
        max_documents=None if is_chat else 10,
        validation_fraction=0.2,
        streaming=False,
        tokenizer=None,
        vocab_size=270,
    )
    name = f"{config.model.start} {config.model.architecture}".lower()
    shape = ModelConfig(
        architecture="modernbert" if "bert" in name else "llama",
        size="hidden=32,layers=2,heads=2,intermediate=64",
        dropout=config.model.dropout,
    )
    train = _few_steps(config.train)
    return replace(config, out=f"{config.out}-smoke", data=data, model=shape, adapter=AdapterConfig(), train=train)


def _few_steps(train: TrainConfig) -> TrainConfig:
    return replace(
        train,
        batch_size=2,
        accumulation=min(train.accumulation, 2),
        max_steps=3,
        epochs=None,
        max_minutes=None,
        precision="float32",
        compile="off",
        save_every=3,
        max_validation_windows=4,
    )
