"""A random DiffusionGemma, small enough for tests, and its own sampler on our random numbers.

What `DiffusionGemmaForBlockDiffusion.generate` (transformers 5.23) does, for each canvas of `config.canvas_length`:

1. The encoder reads what is new (first the prompt, then the last canvas), causally, and appends to its cache. The
   decoder reads that cache and never writes it; in windowed layers it sees the last `sliding_window - 1` positions of
   it.
2. The canvas starts as uniform noise over the whole vocabulary, without self-conditioning.
3. Step n = N..1 (48): logits of the whole canvas, divided by T = t_min + (t_max - t_min) n / N (0.4, 0.8). From
   these: a draw per position, the likeliest token per position, the entropy per position in nats.
4. Accepted are the positions of lowest entropy, while the sum of the entropies before the last is at most 0.1. They
   take their draw; every other position takes a new uniform token. What an earlier step accepted plays no part.
5. The divided logits, in the embedding's dtype, are the self-conditioning of the next step: softmax times the
   embedding.
6. A row's canvas ends when its likeliest tokens equal those of the step before (`stability_threshold` = 1 steps) and
   the mean entropy is below 0.005, or with the last step. It then holds the *likeliest* tokens, not the draws.
7. An EOS anywhere in a finished canvas ends the row; what stands behind the first one becomes padding. Otherwise
   canvases follow until there are max_new_tokens, rounded up to whole canvases.
"""

from unittest import mock

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from redraft.prompts import row_keys
from redraft.randomness import uniform
from redraft.sampling.policies.candidates import DRAW_NOISE, DRAW_TOKEN
from redraft.sampling.propose import propose

VOCAB, CANVAS = 40, 6


def tiny_gemma(*, window=5, dtype=torch.float64, attention="sdpa", experts=False, scale=3.0, sharpness=16.0):
    """Build a model of 3 layers, two of them windowed; `scale` and `sharpness` make it sure of unlike things."""
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
        "num_global_key_value_heads": 1, "sliding_window": window, "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS)
    config._attn_implementation = attention
    model = DiffusionGemmaForBlockDiffusion(config).to(dtype).eval()
    model.set_experts_implementation("eager")  # the other kind has no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
        model.lm_head.weight.mul_(sharpness)  # tied to the embedding, whose size the norms take back
    return model


class SharedNoise:
    """Stand in for torch's generators inside `generate` for one row, with the numbers our loop draws."""

    def __init__(self, prompt, *, seed):
        (self.key,) = row_keys([torch.tensor(prompt)], seed=seed)
        self.first, self.step, self.is_between = len(prompt) - CANVAS, 0, True

    def uniform(self, step, purpose):
        return uniform(self.key, step, self.first + torch.arange(CANVAS), purpose)

    def randint(self, low, high, size, device=None):
        if self.is_between:  # a new canvas; otherwise the noise of a step
            self.first += CANVAS
            step = -1
        else:
            step, self.step = self.step, self.step + 1
        self.is_between = True
        return (self.uniform(step, DRAW_NOISE) * high).long().view(size)

    def multinomial(self, probabilities, num_samples):
        self.is_between = False
        u = self.uniform(self.step, DRAW_TOKEN)
        return propose(probabilities.log(), never=None, u=u, temperature=1.0).x_0[:, None]


def own_generate(model, prompt, *, seed=0, **settings):
    """Run the model's own `generate` on our random numbers; return the new tokens and the number of steps."""
    noise = SharedNoise(prompt, seed=seed)
    with mock.patch.object(torch, "randint", noise.randint), mock.patch.object(torch, "multinomial", noise.multinomial):
        out = model.generate(torch.tensor([prompt]), pad_token_id=0, **settings)
    return out.sequences[0, len(prompt) :].tolist(), noise.step
