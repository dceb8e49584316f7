"""A random denoiser and autoencoder, small enough for hundreds of forwards."""

import torch

from redraft.latent.autoencoder import AutoencoderConfig, TextAutoencoder
from redraft.latent.denoiser import LatentDenoiser, LatentDenoiserConfig
from redraft.latent.encode import word_tokenizer
from redraft.latent.sequence import StepShare, ThoughtBatch
from redraft.latent.tasks import WorkedExample
from redraft.latent.thinking import Thinker

WORDS = [str(n) for n in range(20)]


def tiny_thinker(*, answer_tokens=3, max_blocks=3, seed=0, **settings):
    torch.manual_seed(seed)
    tokenizer = word_tokenizer([WorkedExample(prompt=" ".join(WORDS), blocks=("0",), answer="0")])
    config = LatentDenoiserConfig(
        vocab_size=len(tokenizer), prompt_tokens=5, answer_tokens=answer_tokens, max_blocks=max_blocks, latent_dim=4,
        hidden_size=32, num_layers=2, num_heads=2, **settings,
    )  # fmt: skip
    denoiser = LatentDenoiser(config).double().eval()
    autoencoder = TextAutoencoder(
        AutoencoderConfig(vocab_size=len(tokenizer), block_tokens=2, latent_dim=4, hidden_size=16, num_layers=0)
    ).double()
    with torch.no_grad():
        for name, parameter in [*denoiser.named_parameters()]:
            if "table" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # also what starts at zero
        autoencoder.scale.fill_(1.0)
    return Thinker(denoiser, autoencoder.eval(), tokenizer)


def tiny_batch(thinker, *, rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = thinker.denoiser.config
    count = config.max_blocks

    def ids(width):
        return torch.randint(4, config.vocab_size, (rows, width), generator=generator)

    lengths = torch.randint(2, 6, (rows, 1), generator=generator)
    return ThoughtBatch(
        prompt=ids(5),
        is_prompt=torch.arange(5) < lengths,
        blocks=torch.randn(rows, count, config.num_latents, 4, dtype=torch.float64, generator=generator),
        num_blocks=torch.randint(1, count + 1, (rows,), generator=generator),
        answer=ids(config.answer_tokens),
        is_answer=torch.ones(rows, config.answer_tokens, dtype=torch.bool),
    )


def whole_step(batch, *, seed=0, step=0):
    """Take a batch as the global one of a step."""
    rows = torch.arange(len(batch.prompt))
    counts = {"num_blocks": batch.num_blocks.sum(), "num_answer": batch.is_answer.sum()}
    return StepShare(seed=seed, step=step, rows=rows, total_rows=len(rows), **counts)
