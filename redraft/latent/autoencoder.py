"""Text autoencoders: a block of tokens to a few latent vectors and back, behind one class.

`kind` chooses the encoder and the decoder:

    chunk      a linear map of the embeddings of all tokens, and one back (CALM, arXiv 2510.27688)
    resampler  learned queries attend to a frozen encoder (LD4LG, arXiv 2212.09462); a parallel transformer decodes

The decoder is trained on noised latents, as a denoiser's samples are never exact. The gate of an autoencoder is the
share of blocks that it must reconstruct exactly, from clean and from noised latents.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from redraft.errors import unknown_name

KINDS = ("chunk", "resampler")
GATE = {0.0: 0.99, 0.25: 0.95}
"""Share of blocks that must be reconstructed exactly, by relative noise on the latents."""
NOISE_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75)


@no_type_check  # mypy does not know that transformers' __init__ takes any entry
class AutoencoderConfig(PreTrainedConfig):
    """Shape and training of a text autoencoder; saved as its config.json."""

    model_type = "redraft-text-autoencoder"

    kind: str = "chunk"
    vocab_size: int = 64
    block_tokens: int = 4
    num_latents: int = 2
    latent_dim: int = 16
    hidden_size: int = 256
    num_layers: int = 2
    local: bool = False
    pad_token_id: int = 0
    encoder: str | None = None
    encoder_config: dict | None = None
    free_nats: float = 0.1
    stage: str = "autoencoder"
    task: str | None = None
    gate: dict | None = None


class TextAutoencoder(PreTrainedModel):
    """Blocks (batch, tokens), padded at their end, to latents (batch, num_latents, latent_dim) and back."""

    config_class = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        if config.kind not in KINDS:
            raise unknown_name("autoencoder", config.kind, KINDS)
        is_chunk = config.kind == "chunk"
        if is_chunk and config.num_layers:
            raise ValueError(f"chunk is linear now; got num_layers={config.num_layers}, of an MLP. Train it again.")
        unit = 4 if is_chunk else 2 * _num_heads(config.hidden_size)
        if config.hidden_size % unit:
            raise ValueError(f"hidden_size must be a multiple of {unit} for {config.kind}; got {config.hidden_size}.")
        widths = (config.block_tokens, config.hidden_size)
        if config.local and not (is_chunk and all(width % config.num_latents == 0 for width in widths)):
            raise ValueError(f"local needs kind chunk, and widths that {config.num_latents} divides; got {widths}.")
        self.encoder: Any = _ChunkEncoder(config) if is_chunk else _FrozenEncoder(config)
        self.decoder: Any = _ChunkDecoder(config) if is_chunk else _ParallelDecoder(config)
        self.shift: Tensor
        self.scale: Tensor
        shape = (config.num_latents, config.latent_dim)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.zeros(shape))  # 0: not fitted
        self.post_init()
        if is_chunk:
            _start_as_a_projection(self.encoder, self.decoder, groups=config.num_latents if config.local else 1)

    def encode(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch latents dim"], Float[Tensor, "batch latents dim"]]:
        """Return the mean and the log-variance of the latents, before normalisation."""
        mean, logvar = self.encoder(ids, mask).chunk(2, dim=-1)
        # -4: training starts with a narrow posterior; one as wide as the prior learns nothing.
        return mean, (logvar - 4).clamp(-12, 4)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch latents dim"]) -> Int[Tensor, "batch tokens"]:
        """Return the likeliest block for normalised latents."""
        self.require_normalizer()
        return self.logits(latents * self.scale + self.shift).argmax(-1)

    def logits(self, z: Float[Tensor, "batch latents dim"]) -> Float[Tensor, "batch tokens vocab"]:
        """Predict every token of a block from its latents (not normalised)."""
        out: Tensor = self.decoder(z)
        return F.linear(out, self.encoder.embed.weight) if self.config.kind == "chunk" else out

    def encode_normalized(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch latents dim"]:
        """Return the normalised mean: what a denoiser is trained on."""
        self.require_normalizer()
        return (self.encode(ids, mask)[0] - self.shift) / self.scale

    def require_normalizer(self) -> None:
        """Raise ValueError if the normaliser was never fitted."""
        if not (self.scale != 0).all():  # sync
            raise ValueError("this autoencoder has no normaliser; got scale 0. Call fit_normalizer or train it again.")

    @torch.no_grad()
    def fit_normalizer(self, ids: Int[Tensor, "blocks tokens"], mask: Bool[Tensor, "blocks tokens"]) -> None:
        """Set shift and scale so that the latents of these blocks have mean 0 and variance 1 in every dimension."""
        means = torch.cat([self.encode(*part)[0] for part in zip(ids.split(512), mask.split(512), strict=True)])
        self.shift.copy_(means.mean(0))
        self.scale.copy_(means.std(0, correction=min(1, len(means) - 1)).clamp(min=1e-4))

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        latent_noise: Float[Tensor, "batch latents dim"],
        posterior_noise: Float[Tensor, "batch latents dim"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the reconstruction's nats per token and the KL to N(0, 1) in nats per latent dimension.

        `latent_noise` is in units of the latents' standard deviation over the batch.
        """
        mean, logvar = self.encode(ids, mask)
        spread = mean.std(0, correction=0)  # with gradient: else the means would grow until the noise has no effect
        z = mean + (logvar / 2).exp() * posterior_noise + spread * latent_noise
        nats = F.cross_entropy(self.logits(z).flatten(0, 1).float(), ids.flatten())
        kl = (mean.square() + logvar.exp() - 1 - logvar) / 2
        return nats, kl.mean(0).clamp(min=self.config.free_nats).mean()


def _linear(inputs: int, outputs: int) -> Any:
    """Make a linear map with the name that it has in checkpoints: it was the first layer of an MLP."""
    return nn.Sequential(OrderedDict(into=nn.Linear(inputs, outputs)))


class _ChunkEncoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.hidden_size // 4
        self.embed = nn.Embedding(config.vocab_size, width)
        self.mlp = _linear(width * config.block_tokens, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, 2 * config.num_latents * config.latent_dim)
        self.num_latents = config.num_latents

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.mlp(self.embed(ids).flatten(1))).unflatten(1, (self.num_latents, -1))


class _ChunkDecoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.hidden_size // 4
        self.mlp = _linear(config.num_latents * config.latent_dim, config.hidden_size)
        self.places = nn.Linear(config.hidden_size, width * config.block_tokens)
        self.block_tokens = config.block_tokens

    def forward(self, z: Tensor) -> Tensor:
        return self.places(self.mlp(z.flatten(1))).unflatten(1, (self.block_tokens, -1))


@torch.no_grad()
def _start_as_a_projection(encoder: Any, decoder: Any, *, groups: int) -> None:
    """Initialise the encoder as an orthogonal projection of the embeddings and the decoder as its transpose.

    With one group for each vector, each vector starts as a projection of its own tokens only.
    """
    nn.init.normal_(encoder.embed.weight)
    _start_orthogonal(encoder.mlp.into.weight, groups)
    means = torch.empty_like(decoder.mlp.into.weight)  # (hidden, latents * dim)
    _start_orthogonal(means, groups)
    encoder.out.weight.unflatten(0, (encoder.num_latents, 2, -1))[:, 0] = means.T.unflatten(
        0, (encoder.num_latents, -1)
    )
    decoder.mlp.into.weight.copy_(means)
    decoder.places.weight.copy_(encoder.mlp.into.weight.T)


def _start_orthogonal(weight: Tensor, groups: int) -> None:
    """Fill (outputs, inputs) with orthogonal maps from equal groups of inputs to as many groups of outputs."""
    blocks = weight.zero_().unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    for group in range(groups):
        nn.init.orthogonal_(blocks[group, :, group])


class _FrozenEncoder(nn.Module):
    """A frozen pretrained encoder, and learned queries that attend to its states."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        if config.encoder_config is None and config.encoder is None:
            raise ValueError(f"a {config.kind} autoencoder needs encoder=, a folder or hub id of an encoder; got none.")
        self.frozen = _pretrained(config)
        self.frozen.requires_grad_(False)
        width = self.frozen.config.hidden_size
        self.queries = nn.Parameter(0.02 * torch.randn(config.num_latents, width))
        self.layers = _decoder_layers(width, config.num_layers)
        self.out = nn.Linear(width, 2 * config.latent_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            self.frozen.eval()
            hidden = self.frozen(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        queries = self.queries.expand(len(ids), -1, -1)
        return self.out(self.layers(queries, hidden, memory_key_padding_mask=~mask))


class _ParallelDecoder(nn.Module):
    """All tokens at once: learned queries attend to the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.into = nn.Linear(config.latent_dim, config.hidden_size)
        self.queries = nn.Parameter(0.02 * torch.randn(config.block_tokens, config.hidden_size))
        self.places = nn.Parameter(0.02 * torch.randn(config.num_latents, config.hidden_size))
        self.layers = _decoder_layers(config.hidden_size, config.num_layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.head(self.layers(self.queries.expand(len(z), -1, -1), self.into(z) + self.places))


def _pretrained(config: AutoencoderConfig) -> Any:
    """Load the model that `encoder` names, or build it empty for the weights of a saved autoencoder."""
    if config.encoder_config is not None:
        return AutoModel.from_config(AutoConfig.for_model(**config.encoder_config), dtype=torch.float32)
    model = AutoModel.from_pretrained(str(config.encoder), dtype=torch.float32)
    config.encoder_config = model.config.to_dict()
    return model


def _num_heads(width: int) -> int:
    return max(1, width // 64)


def _decoder_layers(width: int, num_layers: int) -> nn.TransformerDecoder:
    layer = nn.TransformerDecoderLayer(
        width, _num_heads(width), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerDecoder(layer, num_layers, norm=nn.LayerNorm(width))


@torch.no_grad()
def measure_gate(
    model: TextAutoencoder,
    ids: Int[Tensor, "blocks tokens"],
    mask: Bool[Tensor, "blocks tokens"],
    levels: Sequence[float] = NOISE_LEVELS,
) -> dict[str, float]:
    """Measure the share of exactly reconstructed blocks, by relative noise on the latents: {"0.25": 0.98, ...}."""
    generator, gate = torch.Generator().manual_seed(0), {}
    for level in levels:
        exact = []
        for part, part_mask in zip(ids.split(512), mask.split(512), strict=True):
            latents = model.encode_normalized(part, part_mask)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            exact.append((model.decode(latents + level * noise) == part).all(1))
        gate[f"{level:g}"] = float(torch.cat(exact).float().mean())
    return gate


def gate_failures(gate: dict[str, float] | None) -> list[str]:
    """List the bounds of the gate that a measurement does not reach; all of them where nothing was measured."""
    shares = {float(level): share for level, share in (gate or {}).items()}
    return [
        f"{100 * shares.get(level, 0.0):.1f} % of blocks exact at noise {level:g} (wanted {100 * bound:g} %)"
        for level, bound in GATE.items()
        if not shares.get(level, 0.0) >= bound  # written so that NaN fails, too
    ]
