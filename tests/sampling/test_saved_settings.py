"""A checkpoint carries the settings of its sampler: no flags needed, and what is given wins."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import redraft
from redraft.cli.parsing import SamplingFlags, parse
from redraft.models.families import FAMILIES
from redraft.sampling.config import SamplingConfig, with_saved
from redraft.sampling.presets import Preset

DATA = Path(__file__).parent.parent / "golden" / "data"
PROMPT = [[3, 4, 5, 6]]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DATA / "llada", tmp_path / "llada")
    return tmp_path / "llada"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def load(folder):
    return redraft.load(folder, device="cpu")


def tokens(lm, **settings):
    return lm.generate(PROMPT, stop=None, **settings).tokens[0].tolist()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_familys_published_settings_are_settings_of_ours(family):
    assert set(family.generation) <= set(SamplingConfig.setting_names())
    config = with_saved(family.generation, {})
    assert {name: getattr(config, name) for name in family.generation} == family.generation


def test_a_familys_published_settings_are_used_without_being_asked_for():
    lm = redraft.load(DATA / "dream", mask_token_id=255, device="cpu")
    assert lm.sampling_config().preset == "dream-entropy"
    published = {"preset": "dream-entropy", "temperature": 0.2, "top_p": 0.95}
    assert tokens(lm, max_new_tokens=24) == tokens(lm, max_new_tokens=24, **published)
    assert tokens(lm, max_new_tokens=24) != tokens(lm, max_new_tokens=24, preset="llada")


def test_what_is_given_wins_over_what_is_saved(folder):
    edit_config(folder, generation={"preset": "fast-dllm", "threshold": 0.7, "block_size": 4, "steps_per_block": 2})
    lm = load(folder)
    assert lm.sampling_config() == SamplingConfig(preset="fast-dllm", threshold=0.7, block_size=4, steps_per_block=2)
    given = lm.sampling_config(threshold=0.5, block_size=None, steps=6)
    assert given == SamplingConfig(preset="fast-dllm", threshold=0.5, steps=6)


def test_a_preset_that_is_named_brings_its_own_settings(folder):
    edit_config(folder, generation={"preset": "sdar", "threshold": 0.7, "temperature": 1.0, "max_new_tokens": 12})
    for preset in ("llada", "sdar"):
        assert load(folder).sampling_config(preset=preset) == SamplingConfig(preset=preset, max_new_tokens=12)


def test_a_saved_block_size_stays_where_it_does_not_divide_the_length(folder):
    lm = load(folder)
    for length, size in ((64, 32), (97, 32), (20, 20)):  # lowered until it divides, it would be 1 for 97
        config = lm.sampling_config(max_new_tokens=length)
        assert config.block_size == config.resolved().block_size == size
    rows = [list(range(3, 10)), [3]]
    out = lm.generate(rows, max_new_tokens=41, steps=41, stop=None)
    assert [len(new) for new in out.tokens] == [41, 41]
    longer = lm.generate(rows, max_new_tokens=64, steps=41, stop=None)  # the canvas holds two whole blocks
    assert all(torch.equal(short, long[:41]) for short, long in zip(out.tokens, longer.tokens, strict=True))
    with pytest.raises(ValueError, match="block_size must divide max_new_tokens; got 32 and 20"):
        lm.sampling_config(max_new_tokens=20, block_size=32)
    with pytest.raises(ValueError, match="max_new_tokens must lie in .1, 1048576.; got 0"):
        lm.sampling_config(max_new_tokens=0)


def test_infilling_does_not_use_what_rests_on_a_length(folder):
    row = [[3, 255, 5, 255, 255, 9]]
    plain = load(folder).infill(row, block_size=None).sequences[0]
    edit_config(folder, generation={"preset": "llada", "block_size": 1, "steps": 1, "max_new_tokens": 2})
    assert torch.equal(load(folder).infill(row).sequences[0], plain)
    assert load(folder).infill(row, steps=2).forwards == [2]


def test_a_saved_name_that_is_no_setting_is_told_and_the_rest_of_the_model_works(folder):
    edit_config(folder, generation={"preset": "llada", "treshold": 0.7})
    lm = load(folder)
    assert lm.logits(torch.tensor(PROMPT)).shape == (1, 4, 256)
    with pytest.raises(ValueError, match="unknown setting in config.json's generation 'treshold'.*'threshold'"):
        lm.generate(PROMPT)
    with pytest.raises(ValueError, match="unknown setting 'temprature'"):
        load(DATA / "llada").generate(PROMPT, temprature=1.0)


@pytest.mark.parametrize("to", [None, "llada"])
def test_saving_and_converting_keep_the_settings(folder, tmp_path, to):
    edit_config(folder, generation={"preset": "llada-random", "steps": 3})
    lm = load(folder)
    lm.model.save_pretrained(tmp_path / "saved")
    redraft.convert(folder, tmp_path / "converted", to=to)
    for made in (tmp_path / "saved", tmp_path / "converted"):
        assert load(made).saved_sampling == {"preset": "llada-random", "steps": 3}
        assert tokens(load(made), max_new_tokens=8) == tokens(lm, max_new_tokens=8)


def test_old_names_that_were_saved_are_read_or_refused_with_the_new_one(folder):
    edit_config(folder, generation={"preset": "fast-dllm-dual", "threshold": 0.7})
    lm = load(folder)
    assert lm.sampling_config() == SamplingConfig(preset="fast-dllm", cache="dual", threshold=0.7)
    edit_config(folder, generation={"preset": "remdm", "eta": 0.1})
    with pytest.raises(ValueError, match=r"config.json's generation 'eta' was removed; got 0.1.*Remasking\(eta=...\)"):
        load(folder).generate(PROMPT)


def twice(policies, config):
    return {"unmask": policies.TopK(k=2)}


TWO_AT_ONCE = Preset(source="this test", build=twice, defaults={"temperature": 0.5})


def test_a_preset_of_ones_own_is_given_as_module_and_name(folder):
    name = f"{__name__}:TWO_AT_ONCE"
    edit_config(folder, generation={"preset": name, "max_new_tokens": 8})
    lm = load(folder)
    assert lm.generate(PROMPT, preset=name, stop=None).forwards == [4]
    assert lm.sampling_config(preset=name).resolved().temperature == 0.5
    with pytest.raises(ValueError, match=f"config.json names code to run: preset '{name}'"):
        lm.generate(PROMPT)  # a checkpoint alone imports nothing
    for preset, message in (
        (f"{__name__}:twice", "must be a redraft.sampling.presets.Preset; got function"),
        (f"{__name__}:THREE", "cannot be imported: .*THREE"),
        ("nowhere:TWO", "cannot be imported: No module named 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate(PROMPT, preset=preset)
    with pytest.raises(ValueError, match="has no setting 'threshold'"):
        lm.generate(PROMPT, preset=name, threshold=0.5)


def flags(*arguments):
    return parse(SamplingFlags, list(arguments), command="sample").given(list(arguments))


def test_flags_that_were_not_given_leave_the_saved_settings_alone():
    assert flags() == {}
    assert flags("--threshold", "0.8", "--max-new-tokens=12") == {"threshold": 0.8, "max_new_tokens": 12}
    assert flags("--preset", "llada") == {"preset": "llada"}
    with pytest.raises(ValueError, match="preset 'llada' has no setting 'threshold'"):
        flags("--preset", "llada", "--threshold", "0.8")


def with_tokenizer(folder, **options):
    words = ["<role>", "</role>", "<|role_end|>", "SYSTEM", "HUMAN", "ASSISTANT", "detailed thinking off", "Hi", "a"]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **options).save_pretrained(folder)


def chat(lm, *contents):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_family_lends_its_chat_template_to_a_tokenizer_without_one(tmp_path):
    shutil.copytree(DATA / "llada2", tmp_path / "model")
    with_tokenizer(tmp_path / "model")
    lm = redraft.load(tmp_path / "model", mask_token_id=255, device="cpu")
    thinks = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    human, assistant = "<role>HUMAN</role>{}<|role_end|>", "<role>ASSISTANT</role>"
    assert chat(lm, "Hi") == thinks + human.format("Hi") + assistant
    several = human.format("Hi") + assistant + "a<|role_end|>" + human.format("Hi") + assistant
    assert chat(lm, "Hi", "a", "Hi") == thinks + several
    with_tokenizer(tmp_path / "model", chat_template="its own")
    assert chat(redraft.load(tmp_path / "model", mask_token_id=255, device="cpu"), "Hi") == "its own"


def test_a_family_with_base_models_lends_none(folder):
    with_tokenizer(folder)
    with pytest.raises(ValueError, match="no chat template; give the prompt as text"):
        load(folder).generate([[{"role": "user", "content": "Hi"}]])
