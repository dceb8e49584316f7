"""Text autoencoders: a block of tokens to a few latent vectors and back, behind one class.

`kind` chooses the encoder and the decoder:

    chunk      MLP over the embeddings of all tokens, MLP back (CALM, arXiv 2510.27688)
    resampler  learned queries attend to a frozen encoder (LD4LG, arXiv 2212.09462); a parallel transformer decodes
    sentence   the frozen encoder's mean over tokens as one vector; a parallel transformer decodes
    thought    a language model reads the block and memory tokens; another writes it after them (LaDiR, 2510.04573);
               both start from the one that `encoder` names, if any, and are trained

The decoder is trained on noised latents: a denoiser's samples are never exact.
"""

from functools import cached_property
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from redraft.errors import unknown_name

KINDS = ("chunk", "resampler", "sentence", "thought")


@no_type_check  # transformers gives it an __init__ that takes any entry, behind a signature that does not
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
        if config.kind == "sentence" and config.num_latents != 1:
            raise ValueError(f"a sentence vector is one latent; got num_latents={config.num_latents}. Use 1.")
        if config.num_layers < (0 if config.kind == "chunk" else 1):
            raise ValueError(f"{config.kind} has too few layers; got num_layers={config.num_layers}. Leave it out.")
        heads = _num_heads(config.hidden_size)
        unit = 4 if config.kind == "chunk" else 2 * heads
        if config.hidden_size % unit:
            raise ValueError(f"hidden_size must be a multiple of {unit} for {config.kind}; got {config.hidden_size}.")
        if config.local:
            _check_local(config)
        self.encoder: Any
        self.decoder: Any
        self.shift: Tensor
        self.scale: Tensor
        if config.kind == "chunk":
            self.encoder, self.decoder = _ChunkEncoder(config), _ChunkDecoder(config)
        elif config.kind == "thought":
            is_new = config.encoder_config is None  # the encoder fills it in
            self.encoder, self.decoder = _ThoughtEncoder(config, is_new=is_new), _ThoughtDecoder(config, is_new=is_new)
        else:
            self.encoder, self.decoder = _FrozenEncoder(config), _ParallelDecoder(config)
        shape = (config.num_latents, config.latent_dim)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.zeros(shape))  # 0: not fitted
        self.post_init()
        if config.kind == "chunk":
            _start_as_a_projection(self.encoder, self.decoder, groups=config.num_latents if config.local else 1)

    def encode(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch latents dim"], Float[Tensor, "batch latents dim"]]:
        """Return the mean and the log-variance of the latents, before normalisation."""
        mean, logvar = self.encoder(ids, mask).chunk(2, dim=-1)
        return mean, (logvar - 4).clamp(-12, 4)  # starts nearly exact: a posterior as wide as its prior learns nothing

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch latents dim"]) -> Int[Tensor, "batch tokens"]:
        """Write the likeliest block of normalised latents (greedily, where the decoder is a language model)."""
        z = self.denormalize(latents)
        ids: Tensor = self.decoder.write(z) if self.config.kind == "thought" else self.logits(z).argmax(-1)
        return ids

    def logits(
        self, z: Float[Tensor, "batch latents dim"], ids: Int[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch places vocab"]:
        """Predict every token of a block from its latents (not normalised), and in `thought` from the ids before it."""
        out: Tensor = self.decoder(z, ids)
        return F.linear(out, self.encoder.embed.weight) if self.config.kind == "chunk" else out

    def encode_normalized(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch latents dim"]:
        """Return the normalised mean: what a denoiser is trained on."""
        self.require_normalizer()
        return (self.encode(ids, mask)[0] - self.shift) / self.scale

    def denormalize(self, latents: Float[Tensor, "batch latents dim"]) -> Float[Tensor, "batch latents dim"]:
        """Undo the normalisation."""
        self.require_normalizer()
        return latents * self.scale + self.shift

    def require_normalizer(self) -> None:
        """Raise ValueError where the normaliser was never fitted."""
        if not self.is_normalized:
            raise ValueError("this autoencoder has no normaliser; got scale 0. Call fit_normalizer or train it again.")

    @cached_property
    def is_normalized(self) -> bool:
        """Whether the normaliser was fitted."""
        return bool((self.scale != 0).all())  # sync: once

    @torch.no_grad()
    def fit_normalizer(self, ids: Int[Tensor, "blocks tokens"], mask: Bool[Tensor, "blocks tokens"]) -> None:
        """Set shift and scale so that the latents of these blocks have mean 0 and variance 1 in every dimension."""
        means = torch.cat([self.encode(*part)[0] for part in zip(ids.split(512), mask.split(512), strict=True)])
        self.shift.copy_(means.mean(0))
        self.scale.copy_(means.std(0, correction=min(1, len(means) - 1)).clamp(min=1e-4))
        self.__dict__["is_normalized"] = True

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        latent_noise: Float[Tensor, "batch latents dim"],
        posterior_noise: Float[Tensor, "batch latents dim"],
        is_dropped: Bool[Tensor, "batch tokens"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the reconstruction's nats per token and the KL to N(0, 1) in nats per latent dimension.

        `latent_noise` is in units of the latents' standard deviation over the batch; `is_dropped` tokens are hidden
        from the encoder only.
        """
        mean, logvar = self.encode(torch.where(is_dropped, self.config.pad_token_id, ids), mask)
        spread = mean.std(0, correction=0)  # with its gradient, or the means grow to drown the noise
        z = mean + (logvar / 2).exp() * posterior_noise + spread * latent_noise
        logits = self.logits(z, ids)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        kl = (mean.square() + logvar.exp() - 1 - logvar) / 2
        return nats, kl.mean(0).clamp(min=self.config.free_nats).mean()


def _check_local(config: AutoencoderConfig) -> None:
    if config.kind != "chunk":
        raise ValueError(f"local vectors are for kind chunk; got {config.kind!r}. Leave local out.")
    for name in ("block_tokens", "hidden_size"):
        if getattr(config, name) % config.num_latents:
            raise ValueError(
                f"local vectors need a {name} that num_latents divides; got {getattr(config, name)} and "
                f"{config.num_latents}. Change one of them, or leave local out."
            )


class _ChunkEncoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.hidden_size // 4
        self.embed = nn.Embedding(config.vocab_size, width)
        self.mlp = _Mlp(width * config.block_tokens, config.hidden_size, config.num_layers)
        self.out = nn.Linear(config.hidden_size, 2 * config.num_latents * config.latent_dim)
        self.num_latents = config.num_latents

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.mlp(self.embed(ids).flatten(1))).unflatten(1, (self.num_latents, -1))


class _ChunkDecoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.hidden_size // 4
        self.mlp = _Mlp(config.num_latents * config.latent_dim, config.hidden_size, config.num_layers)
        self.places = nn.Linear(config.hidden_size, width * config.block_tokens)
        self.block_tokens = config.block_tokens

    def forward(self, z: Tensor, ids: Any) -> Tensor:
        return self.places(self.mlp(z.flatten(1))).unflatten(1, (self.block_tokens, -1))


@torch.no_grad()
def _start_as_a_projection(encoder: _ChunkEncoder, decoder: _ChunkDecoder, *, groups: int) -> None:
    """Encode by an orthogonal projection of the embeddings, decode by its transpose: nearly right untrained.

    With one group for each vector, a vector starts with tokens of its own.
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
    """Fill (outputs, inputs) with an orthogonal map of each of equal groups of inputs to as many groups of outputs."""
    blocks = weight.zero_().unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    for group in range(groups):
        nn.init.orthogonal_(blocks[group, :, group])


class _Mlp(nn.Module):
    """A linear map and residual layers on top of it: what a linear code can do is there from the start."""

    def __init__(self, inputs: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.into = nn.Linear(inputs, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


class _FrozenEncoder(nn.Module):
    """A pretrained encoder that is not trained, and learned queries over it (or its mean, for a sentence vector)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        if config.encoder_config is None and config.encoder is None:
            raise ValueError(f"a {config.kind} autoencoder needs encoder=, a folder or hub id of an encoder; got none.")
        self.frozen = _pretrained(config, AutoModel, is_new=config.encoder_config is None)
        self.frozen.requires_grad_(False)
        width = self.frozen.config.hidden_size
        self.queries = None
        if config.kind == "resampler":
            self.queries = nn.Parameter(0.02 * torch.randn(config.num_latents, width))
            self.layers = _decoder_layers(width, config.num_layers)
        self.out = nn.Linear(width, 2 * config.latent_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            self.frozen.eval()
            hidden = self.frozen(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.queries is None:
            kept = mask[..., None].to(hidden)
            return self.out((hidden * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1))
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

    def forward(self, z: Tensor, ids: Any) -> Tensor:
        return self.head(self.layers(self.queries.expand(len(z), -1, -1), self.into(z) + self.places))


class _ThoughtEncoder(nn.Module):
    """A causal language model over [block | memory tokens]; what it says at the memory tokens are the latents."""

    def __init__(self, config: AutoencoderConfig, *, is_new: bool) -> None:
        super().__init__()
        self.lm: Any = (
            LlamaModel(_llama(config)) if config.encoder is None else _pretrained(config, AutoModel, is_new=is_new)
        )
        width = self.lm.config.hidden_size
        self.memory = nn.Parameter(0.02 * torch.randn(config.num_latents, width))
        self.out = nn.Linear(width, 2 * config.latent_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        memory = self.memory.expand(len(ids), -1, -1)
        embedded = torch.cat([self.lm.get_input_embeddings()(ids), memory], dim=1)
        seen = torch.cat([mask, mask.new_ones(memory.shape[:2])], dim=1)
        hidden = self.lm(inputs_embeds=embedded, attention_mask=seen.long(), use_cache=False).last_hidden_state
        return self.out(hidden[:, -memory.shape[1] :])


class _ThoughtDecoder(nn.Module):
    """A causal language model with the latents as its prefix."""

    def __init__(self, config: AutoencoderConfig, *, is_new: bool) -> None:
        super().__init__()
        self.lm: Any = LlamaForCausalLM(_llama(config)) if config.encoder is None else _writer(config, is_new=is_new)
        self.into = nn.Linear(config.latent_dim, self.lm.config.hidden_size)
        self.block_tokens = config.block_tokens

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        embedded = torch.cat([self.into(z), self.lm.get_input_embeddings()(ids[:, :-1])], dim=1)
        return self.lm(inputs_embeds=embedded, use_cache=False).logits[:, z.shape[1] - 1 :]

    def write(self, z: Tensor) -> Tensor:
        ids = torch.zeros(len(z), 1, dtype=torch.int64, device=z.device)
        for _ in range(self.block_tokens):  # the last column is a place to be filled, which nothing before it sees
            ids = torch.cat([ids[:, :-1], self(z, ids)[:, -1:].argmax(-1), ids[:, -1:]], dim=1)
        return ids[:, :-1]


def _pretrained(config: AutoencoderConfig, kind: Any, *, is_new: bool) -> Any:
    """Load the model that `encoder` names; or make room for its weights, which a saved autoencoder holds."""
    if not is_new:
        assert config.encoder_config is not None
        return kind.from_config(AutoConfig.for_model(**config.encoder_config), dtype=torch.float32)
    model = kind.from_pretrained(str(config.encoder), dtype=torch.float32)
    config.encoder_config = model.config.to_dict()
    return model


def _writer(config: AutoencoderConfig, *, is_new: bool) -> Any:
    """Make a pretrained language model with a head of its own: transformers reties only a model's outermost head."""
    model = _pretrained(config, AutoModelForCausalLM, is_new=is_new)
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    return model


def _num_heads(width: int) -> int:
    return max(1, width // 64)


def _llama(config: AutoencoderConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=_num_heads(config.hidden_size),
        max_position_embeddings=config.block_tokens + config.num_latents,
        tie_word_embeddings=False,  # transformers reties only a model's own head
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _decoder_layers(width: int, num_layers: int) -> nn.TransformerDecoder:
    layer = nn.TransformerDecoderLayer(
        width, _num_heads(width), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerDecoder(layer, num_layers, norm=nn.LayerNorm(width))
