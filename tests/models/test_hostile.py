"""Damaged and hostile checkpoints: each loads, or ends in one line that says why. None hangs, none runs code."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import redraft

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = "[" * 100_000
BASE = "base_model_name_or_path"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    model = tiny_lm(dtype=torch.float32).model
    model.config.eos_token_id = 1
    model.save_pretrained(folder)
    names = ["<pad>", "<eos>", "<mask>", *(chr(i) for i in range(97, 123))]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def edit(file="config.json", **changes):
    """Change entries of a JSON file."""

    def damage(folder):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return damage


def write(file, content):
    def damage(folder):
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def remove(file):
    return lambda folder: (folder / file).unlink()


def into_folder(file):
    def damage(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def weights(change, *, metadata=True):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        changed = change(tensors)
        tensors = changed if isinstance(changed, dict) else tensors
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} if metadata else None)

    return damage


def shards(*names, keep=False, **more):
    """Write an index that looks for weights in these files."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        if not keep:
            (folder / WEIGHTS).rename(folder / "shard-1.safetensors")
        files = {name: names[i % len(names)] for i, name in enumerate(tensors)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files} | more))

    return damage


def outside(name):
    """Put the shard outside of the folder and let the index point there."""

    def damage(folder):
        (folder / WEIGHTS).rename(folder.parent / "secret.safetensors")
        tensors = load_file(folder.parent / "secret.safetensors")
        target = name if name is not None else str(folder.parent / "secret.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, target)}))

    return damage


def linked(folder):
    """Put the shard on another disk, with a link of the user's own in its place."""
    outside("shard.safetensors")(folder)
    (folder / "shard.safetensors").symlink_to(folder.parent / "secret.safetensors")


def in_a_folder(folder):
    shards("weights/shard-1.safetensors", keep=True)(folder)
    (folder / "weights").mkdir()
    (folder / WEIGHTS).rename(folder / "weights" / "shard-1.safetensors")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pickle-ran",))


def as_bin(change=None, *, content=None):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        if content is not None:
            (folder / "pytorch_model.bin").write_bytes(content)
            return
        torch.save(change(tensors) if change else tensors, folder / "pytorch_model.bin")

    return damage


def settings(**changes):
    def damage(folder):
        raw = json.loads((folder / "config.json").read_text())
        raw["diffusion"] |= changes
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


def everything(*damages):
    def damage(folder):
        for one in damages:
            one(folder)

    return damage


pytestmark = pytest.mark.usefixtures("unchecked")  # values of a wrong type must reach the code
LAYER = "model.layers.1.mlp.up_proj.weight"
CASES = {
    # config.json
    "config absent": remove("config.json"),
    "config empty": write("config.json", ""),
    "config blank": write("config.json", " \n"),
    "config null": write("config.json", "null"),
    "config list": write("config.json", "[1, 2]"),
    "config text": write("config.json", '"llama"'),
    "config number": write("config.json", "7"),
    "config truncated": cut("config.json", 100),
    "config not JSON": write("config.json", "{'a': 1}"),
    "config not UTF-8": write("config.json", b'{"model_type": "\xff\xfe"}'),
    "config UTF-16": write("config.json", '{"model_type": "llama"}'.encode("utf-16")),
    "config BOM": lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
    "config deep": write("config.json", '{"a": ' + DEEP),
    "config deep objects": write("config.json", '{"a":' * 100_000),
    "config a folder": into_folder("config.json"),
    "config empty object": write("config.json", "{}"),
    "config zero bytes": write("config.json", b"\0" * 100),
    "model_type absent": edit(model_type=None),
    "model_type a number": edit(model_type=7),
    "model_type a list": edit(model_type=["llama"]),
    "model_type a dict": edit(model_type={"a": 1}),
    "model_type unknown": edit(model_type="nonesuch"),
    "model_type of an image model": edit(model_type="vit", architectures=["ViTModel"]),
    "remote code": edit(model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
    "remote code of a known type": edit(auto_map={"AutoModelForCausalLM": "evil.Model"}),
    "auto_map a list": edit(model_type="evil", auto_map=["evil.Config"]),
    "architectures null": edit(architectures=None),
    "architectures a text": edit(architectures="LlamaForCausalLM"),
    "architectures a dict": edit(architectures={"a": 1}),
    "architectures of numbers": edit(architectures=[1]),
    "architectures empty": edit(architectures=[]),
    "architectures of no model": edit(architectures=["Trainer"]),
    "architectures another's": edit(architectures=["BertForMaskedLM"]),
    "architectures a headless one": edit(architectures=["LlamaModel"]),
    "architectures dunder": edit(architectures=["__file__"]),
    "layers 1e9": edit(num_hidden_layers=10**9),
    "layers 5000": edit(num_hidden_layers=5000),
    "layers 1e30": edit(num_hidden_layers=1e30),
    "layers -1": edit(num_hidden_layers=-1),
    "layers 0": edit(num_hidden_layers=0),
    "layers fewer": edit(num_hidden_layers=1),
    "layers text": edit(num_hidden_layers="2"),
    "layers null": edit(num_hidden_layers=None),
    "layers a fraction": edit(num_hidden_layers=2.5),
    "labels 1e9": edit(num_labels=10**9),
    "vocab 1e12": edit(vocab_size=10**12),
    "vocab 1e9": edit(vocab_size=10**9),
    "vocab -1": edit(vocab_size=-1),
    "vocab 0": edit(vocab_size=0),
    "vocab 41": edit(vocab_size=41),
    "vocab 39": edit(vocab_size=39),
    "vocab 30": edit(vocab_size=30),
    "vocab text": edit(vocab_size="40"),
    "vocab list": edit(vocab_size=[40]),
    "hidden 1e9": edit(hidden_size=10**9),
    "hidden 33": edit(hidden_size=33, head_dim=None),
    "hidden negative": edit(hidden_size=-32),
    "intermediate 1e9": edit(intermediate_size=10**9),
    "intermediate 1e6": edit(intermediate_size=10**6),
    "heads 0": edit(num_attention_heads=0, head_dim=None),
    "heads 3": edit(num_attention_heads=3, head_dim=None, num_key_value_heads=2),
    "heads 1e9": edit(num_attention_heads=10**9),
    "kv heads 0": edit(num_key_value_heads=0),
    "head_dim 0": edit(head_dim=0),
    "positions -1": edit(max_position_embeddings=-1),
    "positions text": edit(max_position_embeddings="many"),
    "eps NaN": edit(rms_norm_eps=float("nan")),
    "eps text": edit(rms_norm_eps="small"),
    "eps infinite": edit(rms_norm_eps=float("inf")),
    "theta NaN": edit(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}),
    "theta 0": edit(rope_parameters={"rope_type": "default", "rope_theta": 0}),
    "rope unknown": edit(rope_parameters={"rope_type": "nonesuch", "rope_theta": 10000.0}),
    "rope a list": edit(rope_parameters=[1, 2]),
    "activation unknown": edit(hidden_act="nonesuch"),
    "activation null": edit(hidden_act=None),
    "dtype unknown": edit(dtype="float7"),
    "dtype a number": edit(dtype=3),
    "layer_types short": edit(layer_types=["full_attention"]),
    "layer_types unknown": edit(layer_types=["nonesuch", "nonesuch"]),
    "eos outside": edit(eos_token_id=4000),
    "eos text": edit(eos_token_id="</s>"),
    "quantised by nobody": edit(quantization_config={"quant_method": "nonesuch"}),
    "quantised a text": edit(quantization_config="int4"),
    # the diffusion and generation entries
    "diffusion null": edit(diffusion=None),
    "diffusion a list": edit(diffusion=[1]),
    "diffusion a text": edit(diffusion="masked"),
    "diffusion a number": edit(diffusion=3),
    "diffusion empty": edit(diffusion={}),
    "mask outside": settings(mask_token_id=40),
    "mask negative": settings(mask_token_id=-1),
    "mask a text": settings(mask_token_id="<mask>"),
    "mask a fraction": settings(mask_token_id=2.5),
    "mask a list": settings(mask_token_id=[2]),
    "mask true": settings(mask_token_id=True),
    "block size 0": settings(block_size=0),
    "block size a text": settings(block_size="4"),
    "process unknown": settings(process="nonesuch"),
    "process a number": settings(process=1),
    "schedule unknown": settings(schedule="nonesuch"),
    "schedule null": settings(schedule=None),
    "shift a text": settings(shift_logits="yes"),
    "entry unknown": settings(mask_token=2),
    "generation a list": edit(generation=["llada"]),
    "generation a text": edit(generation="llada"),
    "generation of a preset unknown": edit(generation={"preset": "nonesuch"}),
    "generation of a setting unknown": edit(generation={"stepz": 3}),
    # weights
    "weights absent": remove(WEIGHTS),
    "weights empty": write(WEIGHTS, b""),
    "weights 7 bytes": write(WEIGHTS, b"1234567"),
    "weights cut": cut(WEIGHTS, 5000),
    "weights cut at the end": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
    "weights longer": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"),
    "weights text": write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "weights header huge": write(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
    "weights header not JSON": write(WEIGHTS, (8).to_bytes(8, "little") + b"notjson!"),
    "weights a folder": into_folder(WEIGHTS),
    "weights without metadata": weights(lambda w: None, metadata=False),
    "weights of integers": weights(lambda w: w.update({LAYER: w[LAYER].int()})),
    "weights of booleans": weights(lambda w: w.update({LAYER: w[LAYER] > 0})),
    "weights NaN": weights(lambda w: w[LAYER].fill_(float("nan"))),
    "weights one missing": weights(lambda w: w.pop(LAYER)),
    "weights all missing": weights(lambda w: {"a": torch.zeros(1)}),
    "weights one more": weights(lambda w: w.update({"extra": torch.zeros(2)})),
    "weights of another shape": weights(lambda w: w.update({LAYER: w[LAYER][:3].contiguous()})),
    "weights of no dimension": weights(lambda w: w.update({LAYER: torch.tensor(1.0)})),
    "weights renamed": weights(lambda w: {f"x.{name}": tensor for name, tensor in w.items()}),
    "shard missing": shards("shard-1.safetensors", "shard-2.safetensors"),
    "shard whole": shards("shard-1.safetensors"),
    "shard above": outside("../secret.safetensors"),
    "shard above twice": outside("a/../../secret.safetensors"),
    "shard absolute": outside(None),
    "shard above by backslashes": outside("..\\secret.safetensors"),
    "shard above of a name": outside(".."),
    "shard of no name": outside(""),
    "shard on a drive": outside("C:secret.safetensors"),
    "shard on a share": outside("\\\\host\\share\\secret.safetensors"),
    "shard linked": linked,
    "shard in a folder": in_a_folder,
    "shard of a number": shards(3),
    "index without a map": shards("shard-1.safetensors", weight_map=None),
    "index of a list": shards("shard-1.safetensors", weight_map=["a"]),
    "index empty map": shards("shard-1.safetensors", weight_map={}),
    "index not JSON": everything(shards("shard-1.safetensors"), write(INDEX, "{")),
    "index a list": everything(shards("shard-1.safetensors"), write(INDEX, "[]")),
    "index deep": everything(shards("shard-1.safetensors"), write(INDEX, DEEP)),
    "pickle": as_bin(),
    "pickle of code": as_bin(lambda w: w | {"evil": Evil()}),
    "pickle alone": as_bin(content=pickle.dumps(Evil())),
    "pickle of garbage": as_bin(content=b"garbage"),
    "pickle of a list": as_bin(lambda w: list(w.values())),
    # the tokenizer
    "tokenizer empty": write("tokenizer.json", ""),
    "tokenizer truncated": cut("tokenizer.json", 300),
    "tokenizer an empty object": write("tokenizer.json", "{}"),
    "tokenizer a list": write("tokenizer.json", "[]"),
    "tokenizer deep": write("tokenizer.json", DEEP),
    "tokenizer not UTF-8": write("tokenizer.json", b'{"version": "\xff"}'),
    "tokenizer without a model": edit("tokenizer.json", model=None),
    "tokenizer of a model unknown": edit("tokenizer.json", model={"type": "nonesuch"}),
    "tokenizer of ids negative": edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "tokenizer of ids huge": edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": 2**31}, "merges": []}),
    "tokenizer of merges unknown": edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
    "tokenizer added ids huge": edit("tokenizer.json", added_tokens=[{"id": 2**40, "content": "x"}]),
    "tokenizer a folder": into_folder("tokenizer.json"),
    "tokenizer absent": everything(remove("tokenizer.json"), remove("tokenizer_config.json")),
    "tokenizer.json absent": remove("tokenizer.json"),
    "tokenizer_config absent": remove("tokenizer_config.json"),
    "tokenizer_config empty": write("tokenizer_config.json", ""),
    "tokenizer_config a list": write("tokenizer_config.json", "[]"),
    "tokenizer_config null": write("tokenizer_config.json", "null"),
    "tokenizer_config deep": write("tokenizer_config.json", DEEP),
    "tokenizer_config not UTF-8": write("tokenizer_config.json", b'{"a": "\xff"}'),
    "tokenizer class unknown": edit("tokenizer_config.json", tokenizer_class="Nonesuch"),
    "tokenizer class a number": edit("tokenizer_config.json", tokenizer_class=3),
    "tokenizer class remote": edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
    "tokenizer mask a number": edit("tokenizer_config.json", mask_token=7),
    "tokenizer mask a list": edit("tokenizer_config.json", mask_token=["<mask>"]),
    "tokenizer mask new": everything(edit("tokenizer_config.json", mask_token="<other>"), edit(diffusion=None)),
    "tokenizer eos a dict": edit("tokenizer_config.json", eos_token={"content": 3}),
    "tokenizer length a text": edit("tokenizer_config.json", model_max_length="long"),
    "template a number": write("chat_template.jinja", "{{ 1/0 }}"),
    "template broken": write("chat_template.jinja", "{% for %}"),
    "template not UTF-8": write("chat_template.jinja", b"\xff\xfe"),
    "template large": write("chat_template.jinja", "{{ 'a' * 10000000000 }}"),
    "template a folder": into_folder("chat_template.jinja"),
    # other files
    "generation_config empty": write("generation_config.json", ""),
    "generation_config a list": write("generation_config.json", "[]"),
    "generation_config of nonsense": write("generation_config.json", '{"temperature": "hot", "top_k": -5}'),
    "generation_config not UTF-8": write("generation_config.json", b"\xff"),
    "generation_config deep": write("generation_config.json", DEEP),
    "adapter_config empty": write("adapter_config.json", ""),
    "adapter_config a list": write("adapter_config.json", "[]"),
    "adapter_config without a base": write("adapter_config.json", "{}"),
    "adapter_config of a number": write("adapter_config.json", json.dumps({BASE: 3})),
    "adapter_config of itself": lambda f: write("adapter_config.json", json.dumps({BASE: str(f)}))(f),
    "code beside it": write("modeling_llama.py", "raise SystemExit('ran')"),
}  # fmt: skip
TOLD = {
    "tokenizer length a text": "model_max_length must be a number; got 'long'",
    "config absent": "the folder has no config.json.",
    "config empty": "/config.json: ",
    "config blank": "/config.json: ",
    "config null": "it must hold a JSON object; got NoneType.",
    "config list": "it must hold a JSON object; got list.",
    "config text": "it must hold a JSON object; got str.",
    "config number": "it must hold a JSON object; got int.",
    "config truncated": "/config.json: ",
    "config not JSON": "/config.json: ",
    "config not UTF-8": "/config.json: ",
    "config UTF-16": "/config.json: ",
    "config BOM": "/config.json: ",
    "config deep": "/config.json: ",
    "config deep objects": "maximum recursion depth exceeded while decoding a JSON objec",
    "config a folder": "/config.json: ",
    "config empty object": "unknown model_type 'None'",
    "config zero bytes": "/config.json: ",
    "model_type absent": "unknown model_type 'None'",
    "model_type a number": "config.json: model_type must be of type str; got 7.",
    "model_type a list": "config.json: model_type must be of type str; got ('llama',).",
    "model_type a dict": "config.json: model_type must be of type str; got {'a': 1}.",
    "model_type unknown": "unknown model_type 'nonesuch'",
    "model_type of an image model": "transformers has no language model of architecture 'vit', so it has no head.",
    "remote code": "model_type 'evil' is computed by code inside the checkpoint, which is never run.",
    "auto_map a list": "model_type 'evil' is computed by code inside the checkpoint, which is never run.",
    "architectures null": "(none) is not transformers' class with a vocabulary head",
    "architectures a text": "config.json: architectures must be of type tuple; got 'LlamaForCausalLM'.",
    "architectures a dict": "config.json: architectures must be of type tuple; got {'a': 1}.",
    "architectures of numbers": "config.json: architectures must be of type tuple; got (1,).",
    "architectures empty": "(none) is not transformers' class with a vocabulary head",
    "architectures of no model": "Trainer is not transformers' class with a vocabulary head",
    "architectures another's": "BertForMaskedLM is not transformers' class with a vocabulary head",
    "architectures a headless one": "LlamaModel is not transformers' class with a vocabulary head",
    "architectures dunder": "__file__ is not transformers' class with a vocabulary head",
    "layers 1e9": "config.json: num_hidden_layers must be at most 10000; got 1000000000",
    "layers 5000": "config.json has 5000 layers, and the files hold 20 weights",
    "layers 1e30": "config.json: num_hidden_layers must be at most 10000; got 1e+30",
    "layers -1": "18 unexpected weights: model.layers.0.input_layernorm.weight, model.layers.0.mlp",
    "layers 0": "18 unexpected weights: model.layers.0.input_layernorm.weight, model.layers.0.mlp",
    "layers fewer": "9 unexpected weights: model.layers.1.input_layernorm.weight, model.layers.1.mlp.",
    "layers text": "cannot read the model config of",
    "layers null": "cannot read the model config of",
    "layers a fraction": "cannot read the model config of",
    "labels 1e9": "config.json: num_labels must be at most 10000; got 1000000000",
    "vocab 1e12": "config.json: vocab_size must be at most 2147483648; got 1000000000000",
    "vocab 1e9": "config.json asks for 3.2e+10 weights, and the files hold 8.97e+04 bytes",
    "vocab -1": "mask_token_id must lie in the vocabulary of -1 tokens; got 2.",
    "vocab 0": "mask_token_id must lie in the vocabulary of 0 tokens; got 2.",
    "vocab 41": "1 mismatched weights: model.embed_tokens.weight",
    "vocab 39": "1 mismatched weights: model.embed_tokens.weight",
    "vocab 30": "1 mismatched weights: model.embed_tokens.weight",
    "vocab text": "cannot read the model config of",
    "vocab list": "cannot read the model config of",
    "hidden 1e9": "config.json asks for 6.85e+11 weights, and the files hold 8.97e+04 bytes",
    "hidden 33": "cannot read the model config of",
    "hidden negative": "cannot read the model config of",
    "intermediate 1e9": "config.json asks for 1.92e+11 weights, and the files hold 8.97e+04 bytes",
    "intermediate 1e6": "config.json asks for 1.92e+08 weights, and the files hold 8.97e+04 bytes",
    "heads 0": "cannot read the model config of",
    "heads 3": "cannot read the model config of",
    "heads 1e9": "config.json: num_attention_heads must be at most 10000; got 1000000000",
    "kv heads 0": "cannot read the model config of",
    "head_dim 0": "cannot read the model config of",
    "positions text": "cannot read the model config of",
    "eps NaN": "config.json: rms_norm_eps must be a finite number; got nan.",
    "eps text": "cannot read the model config of",
    "eps infinite": "config.json: rms_norm_eps must be a finite number; got inf.",
    "theta NaN": "config.json: rope_theta must be a finite number; got nan.",
    "theta 0": "model.rotary_emb.inv_freq holds NaN or infinity (and 1 more tensors)",
    "rope unknown": "cannot read the model config of",
    "rope a list": "cannot read the model config of",
    "activation unknown": "cannot read the model config of",
    "activation null": "cannot read the model config of",
    "dtype unknown": "cannot read the model config of",
    "dtype a number": "config.json: dtype must be of type str; got 3.",
    "layer_types short": "cannot read the model config of",
    "layer_types unknown": "cannot read the model config of",
    "eos text": "cannot read the model config of",
    "quantised a text": "cannot read the model config of",
    "diffusion a list": "config.json: diffusion must be of type dict; got (1,).",
    "diffusion a text": "config.json: diffusion must be of type dict; got 'masked'.",
    "diffusion a number": "config.json: diffusion must be of type dict; got 3.",
    "mask outside": "mask_token_id must lie in the vocabulary of 40 tokens; got 40.",
    "mask negative": "mask_token_id must lie in the vocabulary of 40 tokens; got -1.",
    "mask a text": "mask_token_id must be of type int; got '<mask>'.",
    "mask a fraction": "mask_token_id must be of type int; got 2.5.",
    "mask a list": "mask_token_id must be of type int; got [2].",
    "mask true": "mask_token_id must be of type int; got True.",
    "block size 0": "diffusion.block_size must lie in [1, 1048576]; got 0.",
    "block size a text": "diffusion.block_size must be one of int, None; got '4'.",
    "process unknown": "unknown diffusion.process in config.json 'nonesuch'",
    "process a number": "diffusion.process must be of type str; got 1",
    "schedule null": "schedule must be of type str; got None.",
    "shift a text": "shift_logits must be of type bool; got 'yes'.",
    "entry unknown": "config.json: diffusion has unknown entries ['mask_token']",
    "generation a list": "config.json: generation must be of type dict; got ('llada',).",
    "generation a text": "config.json: generation must be of type dict; got 'llada'.",
    "weights absent": "there is no model.safetensors",
    "weights empty": "Is a file cut short?",
    "weights 7 bytes": "Is a file cut short?",
    "weights cut": "Is a file cut short?",
    "weights cut at the end": "Is a file cut short?",
    "weights longer": "Is a file cut short?",
    "weights text": "Is a file cut short?",
    "weights header huge": "Is a file cut short?",
    "weights header not JSON": "Is a file cut short?",
    "weights a folder": "there is no model.safetensors",
    "weights of integers": "model.layers.1.mlp.up_proj.weight holds integers (I32), but config.json has no ",
    "weights of booleans": "model.layers.1.mlp.up_proj.weight holds integers (BOOL), but config.json has no",
    "weights NaN": "model.layers.1.mlp.up_proj.weight holds NaN or infinity",
    "weights one missing": "1 missing weights: model.layers.1.mlp.up_proj.weight",
    "weights all missing": "config.json has 2 layers, and the files hold 1 weights",
    "weights one more": "1 unexpected weights: extra",
    "weights of another shape": "1 mismatched weights: model.layers.1.mlp.up_proj.weight",
    "weights of no dimension": "1 mismatched weights: model.layers.1.mlp.up_proj.weight",
    "weights renamed": "21 missing weights: lm_head.weight, model.embed_tokens.weight, model.layers.0.in",
    "shard missing": "shard-2",
    "shard above": "names weights outside of the checkpoint",
    "shard above twice": "names weights outside of the checkpoint",
    "shard absolute": "names weights outside of the checkpoint",
    "shard above by backslashes": "names weights outside of the checkpoint",
    "shard above of a name": "names weights outside of the checkpoint",
    "shard of no name": "names weights outside of the checkpoint",
    "shard on a drive": "names weights outside of the checkpoint",
    "shard on a share": "names weights outside of the checkpoint",
    "shard of a number": "weight_map must name a file for each weight.",
    "index without a map": "weight_map must name a file for each weight.",
    "index of a list": "weight_map must name a file for each weight.",
    "index empty map": "config.json has 2 layers, and the files hold 0 weights",
    "index not JSON": "/model.safetensors.index.json: ",
    "index a list": "it must hold a JSON object; got list.",
    "index deep": "/model.safetensors.index.json: ",
    "pickle of code": "it holds more than tensors (objects",
    "pickle alone": "config.json asks for 2.19e+04 weights, and the files hold 47 bytes",
    "pickle of garbage": "config.json asks for 2.19e+04 weights, and the files hold 7 bytes",
    "pickle of a list": "Is a file cut short?",
    "tokenizer empty": "cannot read the tokenizer of",
    "tokenizer truncated": "cannot read the tokenizer of",
    "tokenizer an empty object": "cannot read the tokenizer of",
    "tokenizer a list": "cannot read the tokenizer of",
    "tokenizer deep": "cannot read the tokenizer of",
    "tokenizer not UTF-8": "cannot read the tokenizer of",
    "tokenizer without a model": "cannot read the tokenizer of",
    "tokenizer of a model unknown": "cannot read the tokenizer of",
    "tokenizer of ids negative": "cannot read the tokenizer of",
    "tokenizer of merges unknown": "cannot read the tokenizer of",
    "tokenizer added ids huge": "cannot read the tokenizer of",
    "tokenizer a folder": "cannot read the tokenizer of",
    "tokenizer.json absent": "cannot read the tokenizer of",
    "tokenizer_config empty": "cannot read the tokenizer of",
    "tokenizer_config a list": "cannot read the tokenizer of",
    "tokenizer_config null": "cannot read the tokenizer of",
    "tokenizer_config deep": "cannot read the tokenizer of",
    "tokenizer_config not UTF-8": "cannot read the tokenizer of",
    "tokenizer class a number": "cannot read the tokenizer of",
    "tokenizer mask a number": "cannot read the tokenizer of",
    "tokenizer mask a list": "cannot read the tokenizer of",
    "tokenizer eos a dict": "cannot read the tokenizer of",
    "template not UTF-8": "cannot read the tokenizer of",
    "template large": "rendering a chat of three words by the chat template takes more than 2 s or 1024",
    "generation_config empty": "/generation_config.json: ",
    "generation_config a list": "it must hold a JSON object; got list.",
    "generation_config not UTF-8": "/generation_config.json: ",
    "generation_config deep": "/generation_config.json: ",
    "adapter_config empty": "/adapter_config.json: ",
    "adapter_config a list": "it must hold a JSON object; got list.",
    "adapter_config without a base": "'.",
    "adapter_config of a number": "'.",
    "adapter_config of itself": "'.",
}
LOADS = {
    "remote code of a known type",
    "positions -1",
    "eos outside",
    "quantised by nobody",
    "diffusion null",
    "diffusion empty",
    "schedule unknown",
    "generation of a preset unknown",
    "generation of a setting unknown",
    "weights without metadata",
    "shard whole",
    "shard linked",
    "shard in a folder",
    "pickle",
    "tokenizer of ids huge",
    "tokenizer absent",
    "tokenizer_config absent",
    "tokenizer class unknown",
    "tokenizer class remote",
    "tokenizer mask new",
    "template a number",
    "template broken",
    "template a folder",
    "generation_config of nonsense",
    "code beside it",
}


def spoilt(whole, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*as pickles:UserWarning")
@pytest.mark.parametrize("name", TOLD)
def test_a_spoilt_checkpoint_is_one_line_that_says_what_is_wrong(whole, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = spoilt(whole, tmp_path, CASES[name])
    with pytest.raises(ValueError, match=re.escape(TOLD[name])) as told:
        redraft.load(folder, device="cpu")
    message = str(told.value)
    assert type(told.value) is ValueError
    assert "\n" not in message
    assert not re.search("weights_only.{0,20}False|trust_remote_code=True", message)
    assert not (tmp_path / "pickle-ran").exists()


REFUSED_LATER = {
    "positions -1": "context of -1 tokens",
    "generation of a preset unknown": "unknown preset 'nonesuch'",
    "generation of a setting unknown": "unknown setting in config.json's generation 'stepz'",
}


@pytest.mark.filterwarnings("ignore:.*as pickles:UserWarning")
@pytest.mark.parametrize("name", sorted(LOADS))
def test_what_does_no_harm_loads_and_generates_or_says_why_not(whole, tmp_path, name):
    lm = redraft.load(spoilt(whole, tmp_path, CASES[name]), device="cpu")
    if name in REFUSED_LATER:
        with pytest.raises(ValueError, match=REFUSED_LATER[name]):
            lm.generate([3, 4], max_new_tokens=2)
    else:
        assert len(lm.generate([3, 4], max_new_tokens=2, stop=None).tokens[0]) == 2


def test_every_case_has_its_outcome_written_down():
    assert set(CASES) == set(TOLD) | LOADS
    assert not set(TOLD) & LOADS
    assert len(CASES) > 180


@pytest.mark.parametrize(
    "name", ["config deep", "layers 1e9", "weights cut", "shard above", "weights NaN", "rope a list"]
)
def test_converting_tells_it_too_and_writes_nothing(whole, tmp_path, name):
    folder = spoilt(whole, tmp_path, CASES[name])
    if "config" not in name:
        edit(diffusion=None)(folder)  # the other way to read a model
    with pytest.raises(ValueError, match=re.escape(TOLD[name])):
        redraft.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_read_as_tensors_alone_and_it_is_said(whole, tmp_path):
    folder = spoilt(whole, tmp_path, as_bin())
    with pytest.warns(UserWarning, match=r"as pickles \(.bin\). Only tensors are read .*no code in them is run"):
        lm = redraft.load(folder, device="cpu")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(lm.logits(ids), redraft.load(whole, device="cpu").logits(ids))


def test_the_hubs_cache_may_link_its_shards_to_its_files(whole, tmp_path):
    """There every file of a snapshot is a link, to beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(whole, snapshot)
    shards("shard-1.safetensors")(snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "shard-1.safetensors").rename(tmp_path / "models--a--b" / "blobs" / "f00")
    (snapshot / "shard-1.safetensors").symlink_to("../../blobs/f00")
    (tmp_path / "link").symlink_to(snapshot)
    ids = torch.arange(3, 9)[None]
    expected = redraft.load(whole, device="cpu").logits(ids)
    for path in (snapshot, tmp_path / "link"):
        assert torch.equal(redraft.load(path, device="cpu").logits(ids), expected)


def test_a_gguf_file_is_told_to_be_converted(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is a GGUF file. Convert it first: redraft convert .*model.gguf OUT"):
        redraft.load(tmp_path / "model.gguf")
