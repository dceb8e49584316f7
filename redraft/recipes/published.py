"""Published runs. What the source beside a run states is set; the rest is our default, or named as ours.

"dllm" is github.com/ZHZisZZ/dllm (example scripts, READMEs), "mdlm" is github.com/kuleshov-group/mdlm (`configs/`).
Batches are those of one process, as published: with N processes give N times as much. Hardware, time and what differs:
docs/recipes.md.
"""

from typing import Any

from redraft.data.chat import ChatConfig
from redraft.data.config import DataConfig
from redraft.models.config import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig

TULU, SMOLTALK = "allenai/tulu-3-sft-mixture@train", "HuggingFaceTB/smoltalk:all@train"


def llada_sft() -> RunConfig:
    """Finetune LLaDA-8B on 10,000 conversations, EOS up to the window's end (dllm, examples/llada/sft.py)."""
    return RunConfig(
        out="runs/llada-sft",
        data=_tulu(),
        model=ModelConfig(start="GSAI-ML/LLaDA-8B-Base"),
        objective=ObjectiveConfig(exclude_mask=False),
        train=_dllm(learning_rate=2e-5, batch_size=4, epochs=5),
    )


def dream_sft() -> RunConfig:
    """Finetune Dream-7B on 10,000 conversations with CART weights (dllm, examples/dream/sft.py)."""
    return RunConfig(
        out="runs/dream-sft",
        data=_tulu(),
        model=ModelConfig(start="Dream-org/Dream-v0-Base-7B"),
        objective=ObjectiveConfig(weighting="cart", cart_p=0.3, exclude_mask=False),
        train=_dllm(learning_rate=2e-5, batch_size=4, epochs=5),
    )


def a2d_mdlm() -> RunConfig:
    """Make Qwen3-0.6B, converted, chat (dllm, Tiny-A2D mdlm v0.1, without its two code sets)."""
    return RunConfig(
        out="runs/a2d-mdlm",
        data=_mixture(1024, TULU, SMOLTALK),
        model=ModelConfig(start="models/qwen3-0.6b-a2d"),
        objective=ObjectiveConfig(exclude_mask=False),
        train=_dllm(learning_rate=1e-4, batch_size=16, accumulation=2, epochs=10),
    )


def a2d_bd3lm() -> RunConfig:
    """Make Qwen3-0.6B, converted, chat in blocks (dllm, Tiny-A2D bd3lm v0.1, without its two code sets)."""
    return RunConfig(
        out="runs/a2d-bd3lm",
        data=_mixture(512, TULU, SMOLTALK, eos_block=32),
        model=ModelConfig(start="models/qwen3-0.6b-a2d"),
        objective=ObjectiveConfig(kind="block", block_size=32, exclude_mask=False),
        train=_dllm(learning_rate=1e-4, batch_size=16, accumulation=2, epochs=10),
    )


def bert_chat() -> RunConfig:
    """Make ModernBERT-large, converted, a chat model (dllm, ModernBERT-large-chat v0.1)."""
    return RunConfig(
        out="runs/bert-chat",
        data=_mixture(1024, TULU, SMOLTALK),
        model=ModelConfig(start="models/modernbert-large"),
        objective=ObjectiveConfig(exclude_mask=False),
        train=_dllm(learning_rate=1e-4, batch_size=48, epochs=10),
    )


def mdlm_owt() -> RunConfig:
    """Train masked diffusion on OpenWebText: 1 M steps of 512 windows (mdlm, configs/config.yaml)."""
    return RunConfig(out="runs/mdlm-owt", data=_owt(), model=_mdlm_small(), train=_mdlm())


def bd3lm_owt() -> RunConfig:
    """Train block diffusion on OpenWebText: MDLM's numbers, without the published search for a range of times."""
    return RunConfig(
        out="runs/bd3lm-owt",
        data=_owt(),
        model=_mdlm_small(),
        objective=ObjectiveConfig(kind="block", block_size=16),  # ours
        train=_mdlm(),
    )


def llada_pretrain() -> RunConfig:
    """Pretrain LLaDA from random weights, 1 % of the windows cut at random (dllm, examples/llada/pt.py)."""
    return RunConfig(
        out="runs/llada-pretrain",
        data=DataConfig(
            source="mlfoundations/dclm-baseline-1.0@train",
            seq_len=1024,
            streaming=True,
            random_length=0.01,
            tokenizer="models/llada-tokenizer",
        ),
        # The published run takes the 8B shape. Ours is 135 M: a sharded run of 8 B needs other flags in any case.
        model=ModelConfig(size="135m"),
        objective=ObjectiveConfig(exclude_mask=False),
        train=_dllm(learning_rate=1e-4, batch_size=4, accumulation=4, max_steps=100_000),
    )


def _tulu() -> DataConfig:
    """The first 11,000 conversations, a tenth of them held out; the scripts take 10,000 and 1,000."""
    chat = ChatConfig(eos="to-block-end", block_size=1024, batching="grouped")  # the script groups by length
    return DataConfig(
        source=TULU, kind="chat", seq_len=1024, max_documents=11_000, validation_fraction=1 / 11, chat=chat
    )


def _mixture(seq_len: int, *sources: str, eos_block: int | None = None) -> DataConfig:
    """Equal shares of the sources (ours: the published runs concatenate them)."""
    chat = ChatConfig(eos="to-block-end", block_size=eos_block or seq_len, batching="grouped")
    return DataConfig(source=",".join(f"{s}:1" for s in sources), kind="chat", seq_len=seq_len, chat=chat)


def _owt() -> DataConfig:
    """OpenWebText, windows of 1024 (configs/model/small.yaml); a tokenizer of our own in the size of GPT-2's."""
    return DataConfig(source="dylanebert/openwebtext@train", seq_len=1024, vocab_size=50_257)


def _mdlm_small() -> ModelConfig:
    """12 layers of width 768 with 12 heads, dropout 0.1 (configs/model/small.yaml); a stock Llama instead of a DiT.

    Our head is the embedding; theirs is a matrix of its own (`tie_word_embeddings: False`).
    """
    return ModelConfig(size="hidden=768,layers=12,heads=12,intermediate=2048", dropout=0.1)


def _mdlm() -> TrainConfig:
    """configs/config.yaml: a global batch of 512 as 32 x 16; constant after 2500 steps of warm-up, EMA 0.9999."""
    return TrainConfig(
        learning_rate=3e-4,
        batch_size=32,
        accumulation=16,
        max_steps=1_000_000,
        warmup=0.0025,
        decay="constant",
        weight_decay=0.0,
        beta_2=0.999,
        ema_decay=0.9999,
        precision="bfloat16",
    )


def _dllm(**changed: Any) -> TrainConfig:
    """dllm/utils/configs.py over transformers' defaults: cosine, warm-up 0.1, no decay of weights, bfloat16."""
    shared: dict[str, Any] = {
        "weight_decay": 0.0,
        "beta_2": 0.999,
        "decay": "cosine",
        "warmup": 0.1,
        "precision": "bfloat16",
    }
    return TrainConfig(**(shared | changed))
