"""Families with a causal context and without golden values: config, renames and layout, against separate forwards."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import SIZES as SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, Ministral3Config, Qwen3Config

import redraft
from redraft.layouts import Layout
from redraft.models.families import find_family
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings

SIZES = SMALL | {"eos_token_id": 1}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MASK, EDGE = 60, 5
ENCODER = {"model.": "encoder.", "lm_head.": "diffusion_head."}
CASES = {
    # family: (stock config, its config.json, its weight names, settings)
    "nemotron": (
        Ministral3Config(**SIZES, head_dim=8, rope_parameters=YARN, max_position_embeddings=128),
        {
            "model_type": "nemotron_labs_diffusion",
            "architectures": ["NemotronLabsDiffusionModel"],
            "rope_scaling": YARN,
            "mask_token_id": MASK,
            "block_size": 4,
            "dlm_paradigm": "bidirectional",
        },
        ENCODER,
        DiffusionSettings(mask_token_id=MASK, block_size=4, context="causal", within="full"),
    ),
    "i-dlm": (
        Qwen3Config(**SIZES, head_dim=8),
        {},
        {},
        DiffusionSettings(mask_token_id=MASK, block_size=4, context="causal", within="causal", shift_logits=True),
    ),
    "efficient-dlm": (
        Qwen3Config(**SIZES, head_dim=8),
        {"architectures": ["EfficientDLM"], "block_size": 8, "mask_token_id": MASK},
        {"model.": "encoder."},
        DiffusionSettings(mask_token_id=MASK, block_size=8),
    ),
    "stable-diffcoder": (LlamaConfig(**SIZES), {}, {}, DiffusionSettings(mask_token_id=MASK, block_size=4)),
}


def checkpoint(folder, name):
    """Save a random stock model in a family's format, and return both."""
    config, changes, renames, _ = CASES[name]
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stock.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for ours, theirs in renames.items():
        weights = {theirs + key[len(ours) :] if key.startswith(ours) else key: v for key, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    family = None if "architectures" in changes else name
    return stock, redraft.load(folder, family=family, mask_token_id=MASK, dtype="float32", device="cpu")


def forward(stock, tokens, sees):
    with torch.no_grad():
        return stock(input_ids=torch.tensor([tokens]), attention_mask=sees[None, None]).logits[0]


def open_block(length, edge, *, within):
    """Who sees whom: causal text, and from `edge` on a block that attends both ways or causally."""
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    if within == "full":
        sees[edge:, edge:] = True
    return sees


@pytest.mark.parametrize("name", CASES)
def test_settings_and_class(tmp_path, name):
    stock, lm = checkpoint(tmp_path, name)
    assert type(lm.model) is type(stock)
    assert lm.denoiser.settings == CASES[name][3]
    assert lm.saved_sampling["preset"] in ("nemotron", "ar", "fast-dllm", "bd3lm")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_a_forward_of_the_stock_class_with_a_mask_of_hand(tmp_path, name):
    stock, lm = checkpoint(tmp_path, name)
    settings, tokens = lm.denoiser.settings, [*range(3, 3 + 2 * 8), MASK, MASK, MASK, MASK]  # blocks of 4 or 8
    length, size = len(tokens), settings.block_size
    if settings.context == "block":
        block = torch.arange(length) // size
        sees, others = block[:, None] >= block[None], {}
    else:
        sees = open_block(length, length - 4, within=settings.within)
        others = {"committed": torch.tensor([length - 4]), "grid_origin": torch.tensor([0])}
    ids = torch.tensor([tokens])
    ours = lm.denoiser(Query.everywhere(ids, shift=False, **others))
    assert torch.allclose(ours, forward(stock, tokens, sees), atol=1e-5)
    other = lm.denoiser.logits(ids, shift=False, layout=Layout())
    assert not torch.allclose(ours, other[0], atol=1e-2)


def by_hand(stock, text, *, num_blocks, threshold):
    """Decode as Nemotron-Labs-Diffusion does, with a forward of the whole text for each step; count the forwards."""
    size, num_forwards = 4, 0
    for _ in range(num_blocks):
        edge = len(text)
        logits = forward(stock, text, open_block(edge, edge, within="causal"))
        logits[:, MASK] = -torch.inf
        text = [*text, int(logits[-1].argmax()), *[MASK] * (size - 1)]
        num_forwards += 1
        is_noise = torch.tensor([False] + [True] * (size - 1))
        while is_noise.any():
            logits = forward(stock, text, open_block(len(text), edge, within="full"))[edge:]
            p = logits.softmax(-1)
            p[:, MASK] = 0.0
            sure, best = p.max(dim=-1)
            taken = is_noise & (sure >= threshold)
            taken[sure.masked_fill(~is_noise, -1.0).argmax()] = True
            text = text[:edge] + torch.where(taken, best, torch.tensor(text[edge:])).tolist()
            is_noise &= ~taken
            num_forwards += 1
    return text, num_forwards


@pytest.mark.parametrize("cache", ["exact", "none"])
@pytest.mark.parametrize("threshold", [0.9, 0.3])
def test_nemotron_decodes_as_a_loop_of_separate_forwards(tmp_path, threshold, cache):
    stock, lm = checkpoint(tmp_path, "nemotron")
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], [3] * 8]
    settings = {"max_new_tokens": 12, "block_size": 4, "threshold": threshold, "stop": None, "cache": cache}
    together = lm.generate(prompts, **settings)
    for row, prompt in enumerate(prompts):
        expected, num_forwards = by_hand(stock, prompt, num_blocks=3, threshold=threshold)
        assert together.sequences[row].tolist() == expected
        assert together.forwards[row] == num_forwards


def test_i_dlm_writes_what_greedy_transformers_writes(tmp_path):
    stock, lm = checkpoint(tmp_path, "i-dlm")
    theirs = stock.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=10, do_sample=False, eos_token_id=-1, bad_words_ids=[[MASK]]
    )
    assert lm.generate([5, 6, 7], max_new_tokens=10, stop=None).sequences[0].tolist() == theirs[0].tolist()


def test_formats_that_look_autoregressive_are_known_by_class_or_hub_id():
    assert find_family({"model_type": "qwen2", "architectures": ["SDLMQwen2ForCausalLM"]}).name == "sdlm"
    assert find_family({"model_type": "qwen3", "architectures": ["EfficientDLM"]}).name == "efficient-dlm"
    assert find_family({"model_type": "qwen3"}, hub_id="yifanyu/I-DLM-8B").name == "i-dlm"
    assert find_family({"model_type": "llama"}, hub_id="ByteDance-Seed/Stable-DiffCoder-8B-Base").name == (
        "stable-diffcoder"
    )
    assert find_family({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}) is None
