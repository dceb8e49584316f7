"""Published runs. Settings that the cited source states are set; the others are our defaults, or marked as ours.

"dllm" is github.com/ZHZisZZ/dllm (example scripts, READMEs), "mdlm" is github.com/kuleshov-group/mdlm (`configs/`).
Batch sizes are for one process, as published: multiply them by the number of processes. docs/recipes.md lists hardware,
time and differences.
"""

from dataclasses import replace

from redraft.data.config import ChatConfig, DataConfig
from redraft.models.config import ModelConfig
from redraft.training.config import ObjectiveConfig, RunConfig, TrainConfig

TULU, SMOLTALK = "allenai/tulu-3-sft-mixture@train", "HuggingFaceTB/smoltalk:all@train"
DLLM = TrainConfig(weight_decay=0.0, beta_2=0.999, decay="cosine", warmup=0.1, precision="bfloat16")
"""dllm/utils/configs.py over transformers' defaults: cosine, warm-up 0.1, no decay of weights, bfloat16."""
MDLM = TrainConfig(
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
"""configs/config.yaml: a global batch of 512 as 32 x 16; constant after 2500 steps of warm-up, EMA 0.9999."""


def llada_sft() -> RunConfig:
    """Finetune LLaDA-8B on 10,000 conversations, padded with EOS to the window's end (dllm, examples/llada/sft.py)."""
    # The first 11,000 conversations, a tenth of them for validation (the scripts take 10,000 and 1,000), by length.
    chat = ChatConfig(eos_block=1024, batching="grouped")
    data = DataConfig(
        source=TULU, kind="chat", seq_len=1024, max_documents=11_000, validation_fraction=1 / 11, chat=chat
    )
    return RunConfig(
        out="runs/llada-sft",
        data=data,
        model=ModelConfig(start="GSAI-ML/LLaDA-8B-Base"),
        objective=ObjectiveConfig(exclude_mask=False),
        train=replace(DLLM, learning_rate=2e-5, batch_size=4, epochs=5),
    )


def dream_sft() -> RunConfig:
    """Finetune Dream-7B on 10,000 conversations with CART weights (dllm, examples/dream/sft.py)."""
    return replace(
        llada_sft(),
        out="runs/dream-sft",
        model=ModelConfig(start="Dream-org/Dream-v0-Base-7B"),
        objective=ObjectiveConfig(cart=0.3, exclude_mask=False),
    )


def a2d_mdlm() -> RunConfig:
    """Finetune a converted Qwen3-0.6B on conversations (dllm, Tiny-A2D mdlm v0.1, without its two code data sets)."""
    return RunConfig(
        out="runs/a2d-mdlm",
        data=_mixture(1024, eos_block=1024),
        model=ModelConfig(start="models/qwen3-0.6b-a2d"),
        objective=ObjectiveConfig(exclude_mask=False),
        train=replace(DLLM, learning_rate=1e-4, batch_size=16, accumulation=2, epochs=10),
    )


def a2d_bd3lm() -> RunConfig:
    """The same by block diffusion (dllm, Tiny-A2D bd3lm v0.1, without its two code data sets)."""
    return replace(
        a2d_mdlm(),
        out="runs/a2d-bd3lm",
        data=_mixture(512, eos_block=32),
        objective=ObjectiveConfig(kind="block", block_size=32, exclude_mask=False),
    )


def bert_chat() -> RunConfig:
    """Finetune a converted ModernBERT-large on conversations (dllm, ModernBERT-large-chat v0.1)."""
    train = replace(DLLM, learning_rate=1e-4, batch_size=48, epochs=10)
    return replace(a2d_mdlm(), out="runs/bert-chat", model=ModelConfig(start="models/modernbert-large"), train=train)


def mdlm_owt() -> RunConfig:
    """Train masked diffusion on OpenWebText: 1 M steps of 512 windows (mdlm, configs/config.yaml)."""
    return RunConfig(
        out="runs/mdlm-owt",
        # configs/model/small.yaml: windows of 1024; our tokenizer, as large as GPT-2's.
        data=DataConfig(source="dylanebert/openwebtext@train", seq_len=1024, vocab_size=50_257),
        # The same shape; a stock Llama instead of a DiT, with tied embeddings (theirs: `tie_word_embeddings: False`).
        model=ModelConfig(size="hidden=768,layers=12,heads=12,intermediate=2048", dropout=0.1),
        train=MDLM,
    )


def bd3lm_owt() -> RunConfig:
    """Train block diffusion on OpenWebText with MDLM's settings; BD3LM's search for a range of t is left out."""
    return replace(mdlm_owt(), out="runs/bd3lm-owt", objective=ObjectiveConfig(kind="block", block_size=16))  # ours


def llada_pretrain() -> RunConfig:
    """Pretrain LLaDA from random weights, 1 % of the windows cut to a random length (dllm, examples/llada/pt.py)."""
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
        train=replace(DLLM, learning_rate=1e-4, batch_size=4, accumulation=4, max_steps=100_000),
    )


def _mixture(seq_len: int, *, eos_block: int) -> DataConfig:
    """Equal shares of both sources (ours: the published runs concatenate them)."""
    chat = ChatConfig(eos_block=eos_block, batching="grouped")
    return DataConfig(source=f"{TULU}:1,{SMOLTALK}:1", kind="chat", seq_len=seq_len, chat=chat)
