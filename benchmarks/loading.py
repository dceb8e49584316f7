"""What `redraft.load` costs beside a plain read of the same files: seconds, and peak memory over the weights' bytes.

python benchmarks/loading.py [--layers 8 16] [--ways map load] [--folder DIR] [--most-gb 10]

Writes a checkpoint of LLaDA-8B's widths (bfloat16, its own names, shards of at most 2.5 GB) with as many layers as
asked for, or as fit into `--most-gb`. Each way of reading runs in a fresh process, once with the files dropped from the
page cache (cold: the disk) and once with them in it (warm). Safetensors maps files, so a load may return before a byte
is read: therefore every page of every weight is then touched, and both times are given. Peak is VmHWM, the most of the
process that was ever resident, Python, torch and mapped file pages counted; `anonymous` is the part that no file backs,
which the kernel cannot take back. The folder is deleted afterwards.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe
from safetensors import safe_open
from safetensors.torch import save_file

D_MODEL, MLP, VOCAB = 4096, 12288, 126464
SHARD_BYTES = 2.5e9
GB = 1e9
PAGE = 4096
WAYS = {
    "map": "safetensors, mapped",
    "copy": "safetensors, copied to memory",
    "load": "`redraft.load`",
    "load float16": '`redraft.load(dtype="float16")`, which converts',
}
CONFIG = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": D_MODEL, "n_heads": 32, "n_kv_heads": 32,
    "mlp_hidden_size": MLP, "embedding_size": VOCAB, "vocab_size": VOCAB, "max_sequence_length": 4096,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "activation_type": "silu", "weight_tying": False,
    "mask_token_id": 126336, "eos_token_id": 126081, "dtype": "bfloat16",
}  # fmt: skip


def shapes(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name the weights of LLaDA, in its order."""
    yield "model.transformer.wte.weight", (VOCAB, D_MODEL)
    for layer in range(num_layers):
        block = f"model.transformer.blocks.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            yield f"{block}.{name}.weight", (D_MODEL, D_MODEL)
        for name in ("ff_proj", "up_proj"):
            yield f"{block}.{name}.weight", (MLP, D_MODEL)
        yield f"{block}.ff_out.weight", (D_MODEL, MLP)
        for name in ("attn_norm", "ff_norm"):
            yield f"{block}.{name}.weight", (D_MODEL,)
    yield "model.transformer.ln_f.weight", (D_MODEL,)
    yield "model.transformer.ff_out.weight", (VOCAB, D_MODEL)


def num_bytes(num_layers: int) -> int:
    """Count the bytes of the weights in bfloat16."""
    return sum(2 * torch.Size(shape).numel() for _, shape in shapes(num_layers))


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write random shards, their index and the config."""
    noise = (torch.randn(2**24) * 0.02).bfloat16()
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(num_layers):
        size = torch.Size(shape).numel()
        if shard and 2 * size + sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
        shard[name] = noise.repeat(-(-size // noise.numel()))[:size].view(shape).clone()
    flush()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"n_layers": num_layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> dict[str, float]:
    """Read the process' memory in GB: peak, anonymous, file-backed."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 / GB for name in ("VmHWM", "RssAnon", "RssFile")}


def read_plainly(folder: Path, *, copy: bool) -> list[torch.Tensor]:
    """Read every tensor of every shard with safetensors alone."""
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                tensors.append(tensor.clone() if copy else tensor)
    return tensors


def load_ours(folder: Path, dtype: str) -> list[torch.Tensor]:
    """Load the model as users do."""
    import redraft

    return list(redraft.load(folder, dtype=dtype, device="cpu").model.parameters())


def measure(way: str, folder: Path) -> dict[str, float]:
    """Read in this process, touch every page, and report seconds and peaks."""
    import transformers

    import redraft

    logging.disable(logging.ERROR)  # torchao's, about kernels of other machines
    transformers.utils.logging.disable_progress_bar()
    assert transformers.LlamaForCausalLM.__module__ != redraft.__name__  # imported: start-up has its own benchmark
    peaks = resident()
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.01):
            for name, value in resident().items():
                peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if way.startswith("load"):
        tensors = load_ours(folder, "float16" if way == "load float16" else "auto")
    else:
        tensors = read_plainly(folder, copy=way == "copy")
    returned = time.perf_counter() - start
    for tensor in tensors:
        tensor.detach().flatten().view(torch.int16)[:: PAGE // 2].sum()
    touched = time.perf_counter() - start
    is_done.set()
    watcher.join()
    peaks["VmHWM"] = resident()["VmHWM"]
    return {"returned": returned, "touched": touched, **peaks}


def in_fresh_process(way: str, folder: Path) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def benchmark(num_layers: int, ways: list[str], parent: str | None) -> None:
    """Write, measure every way, print rows, delete."""
    weights = num_bytes(num_layers) / GB
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        write_checkpoint(folder, num_layers)
        for way in ways:
            for cache in ("cold", "warm"):
                if cache == "cold":
                    drop_pages(folder)
                got = in_fresh_process(way, folder)
                numbers = (got["returned"], got["touched"], got["VmHWM"], got["VmHWM"] / weights, got["RssAnon"])
                cells = [f"{weights:.2f}", WAYS[way], cache, *(f"{number:.2f}" for number in numbers)]
                print(f"| {num_layers} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", help="of LLaDA's 32; by default as many as fit")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways of reading")
    parser.add_argument("--most-gb", type=float, help="memory to use; by default 80 %% of what is available")
    parser.add_argument("--folder", help="where to write; by default the temporary folder")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, Path(args.folder))))
        return
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    most = args.most_gb or 0.8 * available
    fitting = [layers for layers in range(1, 33) if num_bytes(layers) / GB <= most]
    print(describe(Path(__file__).name, sys.argv[1:]))
    heads = ["layers", "weights GB", "way", "page cache", "s until it returns", "s until every page is read"]
    heads += ["peak GB", "/ weights", "anonymous GB"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for layers in args.layers or fitting[-1:]:
        benchmark(layers, args.ways, args.folder)


if __name__ == "__main__":
    main()
