"""Attention in pieces and flex attention equal the boolean mask, forward and backward; what is chosen where."""

from dataclasses import replace

import pytest
import torch
from tiny import TinyTokenizer, tiny_lm
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MptConfig, Qwen2Config, Qwen3MoeConfig

from redraft.layouts import Layout, attention_mask, pair_rule, segment_positions
from redraft.models import attention
from redraft.models.attention import choose_attention, flex_mask
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.query import Query
from redraft.models.settings import DiffusionSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTH = 37  # of a row: the last block, and the last piece, are ragged
SEGMENTS = {
    "whole": (None, False),
    "padded": ([1] * 30 + [0] * 7, False),
    "seen across": ([1] * 9 + [2] * 20 + [3] * 8, False),
    "isolated": ([1] * 9 + [2] * 20 + [3] * 6 + [0] * 2, True),
}
TINY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Cut rows of a few tokens as rows of hundreds are cut."""
    monkeypatch.setattr("redraft.layouts.TOKENS_PER_PIECE", 8)


def segments_of(name, *, copies=1):
    ids, isolate = SEGMENTS[name]
    rolled = None if ids is None else torch.tensor([ids, sorted(ids, reverse=True)]).repeat(1, copies)
    return {"segment_ids": rolled, "isolate_segments": isolate}


def layouts_of(block_sizes=(1, 3, 5, 8, 16, LENGTH)):
    blocks = [Layout(block_size=size, is_two_copy=two) for size in block_sizes for two in (True, False)]
    return [Layout(), *blocks]


def positions_of(layout, segments):
    length = LENGTH
    if segments["isolate_segments"]:
        positions = segment_positions(segments["segment_ids"][:, :length])
    else:
        positions = torch.arange(length).expand(2, -1)
    return positions.repeat(1, 2) if layout.is_two_copy else positions


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("layout", layouts_of(), ids=str)
def test_the_pieces_hold_every_pair_that_the_mask_shows(layout, name):
    segments = segments_of(name, copies=2 if layout.is_two_copy else 1)
    positions = positions_of(layout, segments)
    mask = attention_mask(layout, positions, **segments)
    pieces = layout.pieces(positions.shape[1], is_aligned=not segments["isolate_segments"])
    if not pieces:
        assert layout.block_size is None or layout.block_size * 2 > LENGTH
        return
    held = torch.zeros(positions.shape[1], positions.shape[1], dtype=torch.int64)
    for queries, keys in pieces:
        for (a, b), (c, d) in [(query, key) for query in queries for key in keys]:
            held[a:b, c:d] += 1
    assert held.max() == 1  # no pair twice
    assert not (mask[:, 0] & (held == 0)).any()
    assert held.float().mean() < 0.95


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("layout", layouts_of(), ids=str)
def test_flex_attentions_mask_equals_the_boolean_one(layout, name):
    segments = segments_of(name, copies=2 if layout.is_two_copy else 1)
    positions = positions_of(layout, segments)
    mask, flex = attention_mask(layout, positions, **segments), flex_mask(layout, positions, **segments)
    if mask is None:
        assert flex is None
        return
    row, index = torch.arange(2)[:, None, None], torch.arange(positions.shape[1])
    pairs = flex.mask_mod(row, torch.tensor(0), index[:, None], index)
    assert torch.equal(pairs.expand_as(mask[:, 0]), mask[:, 0])
    blocks = flex.to_dense()[:, 0].bool()  # blocks of 128 that the kernel visits: here it must be all
    assert blocks.all()


def test_flex_visits_no_block_that_is_empty():
    layout, length = Layout(block_size=16, is_two_copy=True), 1024
    flex = flex_mask(layout, torch.arange(length // 2).repeat(2)[None], segment_ids=None, isolate_segments=False)
    mask = attention_mask(layout, torch.arange(length // 2).repeat(2)[None])
    expected = mask[0, 0].view(8, 128, 8, 128).any(dim=3).any(dim=1)
    assert torch.equal(flex.to_dense()[0, 0].bool(), expected)
    assert expected.float().mean() < 0.4


def test_the_mask_of_rows_without_segments_is_built_once():
    layout, positions = Layout(block_size=4, is_two_copy=True), torch.arange(16).repeat(2)[None]
    first, second = (flex_mask(layout, positions, segment_ids=None, isolate_segments=False) for _ in range(2))
    assert first is second


def models():
    torch.manual_seed(0)
    grouped = {**TINY, "num_key_value_heads": 2}
    configs = {
        "llama, grouped heads": LlamaConfig(**grouped),
        "odd heads": LlamaConfig(**{**TINY, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}),
        "windows": Qwen2Config(**grouped, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "experts": Qwen3MoeConfig(
            **grouped, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, head_dim=8
        ),
    }
    for name, config in configs.items():
        config.is_causal = False
        model = AutoModelForCausalLM.from_config(config).eval()
        yield name, model if name == "experts" else model.double()  # grouped products know no float64
    yield "modernbert", tiny_lm(architecture="modernbert").model


def outcome(denoiser, ids, layout, segments):
    """Logits and gradients."""
    denoiser.model.zero_grad()
    logits = denoiser.logits(ids, layout=layout, **segments)
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None]


def assert_equal(found, expected):
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert len(found[1]) == len(expected[1])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(("family", "model"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("name", SEGMENTS)
def test_attention_in_pieces_equals_the_mask_forward_and_backward(family, model, name):
    plain = Denoiser(model, DiffusionSettings(mask_token_id=2))
    layouts = layouts_of((1, 5, 8))
    wanted = []
    for layout in layouts:
        ids = torch.randint(3, 40, (2, LENGTH * (2 if layout.is_two_copy else 1)))
        segments = segments_of(name, copies=2 if layout.is_two_copy else 1)
        wanted.append((ids, segments, outcome(plain, ids, layout, segments)))
    way = choose_attention(model, "auto", device=CPU, dtype=torch.float64)
    assert way == "pieces"
    ours = replace(plain, attention=way)
    for layout, (ids, segments, expected) in zip(layouts, wanted, strict=True):
        inputs = ours.inputs(Query.everywhere(ids, layout=layout, **segments))
        assert ("pieces" in inputs) == (layout.block_size is not None)
        assert_equal(outcome(ours, ids, layout, segments), expected)


def test_pieces_that_hide_a_pair_are_noticed():
    """The test above can fail."""
    lm = tiny_lm()
    layout, ids = Layout(block_size=5), torch.randint(3, 40, (2, LENGTH))
    expected = lm.denoiser.logits(ids, layout=layout)
    ours = replace(lm.denoiser, attention=choose_attention(lm.model, "pieces", device=CPU, dtype=torch.float64))
    inputs = ours.inputs(Query.everywhere(ids, layout=layout))
    short = tuple((queries, ((0, max(a for a, _ in queries) + 1),)) for queries, _ in inputs["pieces"])
    short = (*short[:-1], inputs["pieces"][-1])
    assert (lm.model(**inputs | {"pieces": short}).logits - expected).abs().max() > 1e-3


@pytest.fixture
def _flex_on_cpu(monkeypatch):
    """Let flex attention run here: without compiling, and with the gradients that torch allows on a GPU alone."""
    flex = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    integration = __import__("transformers.integrations.flex_attention", fromlist=["x"])
    monkeypatch.setattr(integration.WrappedFlexAttention, "__call__", lambda _: flex.flex_attention)
    attention._register()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.usefixtures("_flex_on_cpu")
@pytest.mark.parametrize(("family", "model"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("name", SEGMENTS)
def test_flex_attention_uncompiled_equals_the_mask_forward_and_backward(family, model, name):
    model = model.float()
    plain = Denoiser(model, DiffusionSettings(mask_token_id=2))
    for layout in (Layout(), Layout(block_size=5), Layout(block_size=5, is_two_copy=True)):
        ids = torch.randint(3, 40, (2, LENGTH * (2 if layout.is_two_copy else 1)))
        segments = segments_of(name, copies=2 if layout.is_two_copy else 1)
        model.set_attn_implementation("sdpa")
        expected = outcome(plain, ids, layout, segments)
        model.set_attn_implementation(attention.NAME)
        ours = replace(plain, attention="flex")
        mask = ours.inputs(Query.everywhere(ids, layout=layout, **segments))["attention_mask"]
        assert isinstance(mask, BlockMask) == (family != "windows" and (layout != Layout() or name != "whole"))
        assert_equal(outcome(ours, ids, layout, segments), expected)


def built(**changes):
    settings = DiffusionSettings(mask_token_id=2)
    return build_model(ModelConfig(**{"size": "1m,layers=1"} | changes), settings, tokenizer=TinyTokenizer(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_cuda_flex_is_chosen(dtype, monkeypatch):
    monkeypatch.setattr(attention, "can_compile", lambda: True)
    for wanted in ("auto", "flex"):
        assert choose_attention(built(), wanted, device=CUDA, dtype=dtype) == "flex"
    assert choose_attention(built(), "mask", device=CUDA, dtype=dtype) == "mask"


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "compiles", "told"),
    [
        ({}, CPU, torch.float32, True, "needs CUDA; got device cpu"),
        ({}, CUDA, torch.float64, True, "needs float32, bfloat16 or float16; got torch.float64"),
        ({"size": "1m,layers=1,hidden=16,heads=2"}, CUDA, torch.float32, True, "at least 16 dimensions; got 8"),
        ({"dropout": 0.1}, CUDA, torch.float32, True, "has no dropout; got attention_dropout 0.1"),
        ({}, CUDA, torch.float32, False, "compile"),
    ],
)
def test_where_flex_cannot_be_had_auto_does_without_and_by_name_it_is_refused(
    changes, device, dtype, compiles, told, monkeypatch
):
    monkeypatch.setattr(attention, "can_compile", lambda: compiles)
    found = choose_attention(built(**changes), "auto", device=device, dtype=dtype)
    assert found == ("pieces" if device == CPU else "mask")
    with pytest.raises(ValueError, match=rf"attention flex .*{told}.*Use auto or mask\."):
        choose_attention(built(**changes), "flex", device=device, dtype=dtype)


@pytest.mark.parametrize(
    "config",
    [
        MptConfig(vocab_size=40, d_model=32, n_heads=2, n_layers=1),
        Gemma2Config(**TINY, num_key_value_heads=2, head_dim=16, attn_implementation="eager", pad_token_id=0),
    ],
    ids=["attention of its own", "eager"],
)
def test_a_model_whose_attention_cannot_be_exchanged_keeps_the_mask(config):
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    assert choose_attention(model, "auto", device=CPU, dtype=torch.float32) == "mask"
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="pieces needs a model whose attention can be replaced"):
        choose_attention(model, "pieces", device=CPU, dtype=torch.float32)


def test_what_is_saved_does_not_name_our_attention(tmp_path):
    model = built()
    choose_attention(model, "pieces", device=CPU, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_rule_of_one_row_stands_for_all_rows():
    rule = pair_rule(Layout(block_size=2), torch.arange(4)[None])
    index = torch.arange(4)
    seen = rule(torch.tensor([0, 7])[:, None, None], torch.tensor(0), index[:, None], index)
    assert torch.equal(seen[0], seen[1])
