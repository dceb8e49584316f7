"""Our training step against a plain loop of the same model: useful tokens per second, peak memory, utilisation.

    python benchmarks/training.py [--models demo smollm] [--rounds 3]
    python benchmarks/training.py --block 16      # block diffusion in one forward against two naive ones
    python benchmarks/training.py --head 150000   # peak memory of head and loss over 8192 tokens, chunked against plain
    python benchmarks/training.py --lora          # a step of full finetuning, LoRA, QLoRA, each with checkpointing

Plain: one document per row, padded to the longest of the batch, logits over the whole vocabulary at all positions; as
many documents as hold the useful tokens of one of our steps.
Ours: the same documents packed, head and loss at the noised positions in chunks. Documents are the functions of the
standard library. Each measurement is a process of its own; plain and ours take turns, ratios are per pair, medians are
printed. "Memory returned" leaves out what `training.machine.keep_freed_memory` does. Peak memory is that of the process
above what it held before the model was built.
"""

import argparse
import ast
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe

from redraft.data.packing import pack
from redraft.data.sources import read_documents
from redraft.data.tokenizer import encode_documents, train_tokenizer
from redraft.language_model import load
from redraft.likelihood.objectives.diffusion import Diffusion
from redraft.likelihood.problem import CleanRows, NoiseKey, Objective, problem_loss
from redraft.models.attention import choose_attention
from redraft.models.build import build_model
from redraft.models.config import UNDER_ADAPTERS, AdapterConfig, ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.head import chunked_loss
from redraft.models.settings import DiffusionSettings
from redraft.processes.masked import MaskedDiffusion
from redraft.training.adapter import add_adapter, enable_checkpointing, num_parameters
from redraft.training.machine import keep_freed_memory

MODELS = {  # model size, vocabulary, tokens per row, rows per step
    "demo": ("5m", 4096, 256, 32),
    "smollm": ("135m", 49152, 512, 4),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def documents() -> list[str]:
    """Functions of the standard library's modules."""
    found: list[str] = []
    for module in read_documents("stdlib"):
        lines = module.splitlines(keepends=True)
        for node in ast.parse(module).body:
            if isinstance(node, ast.FunctionDef):
                found.append("".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(found) > 3000:
            break
    return found


class Tokens:
    """Special ids of a model that is never asked for text."""

    bos_token_id, eos_token_id, pad_token_id, mask_token_id = None, 1, 0, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def plain_batches(
    token_lists: list[list[int]], *, tokens: int, seq_len: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One document per row, cut at seq_len, padded to the longest; as many rows as hold `tokens` useful tokens."""
    batch: list[torch.Tensor] = []
    for document in token_lists:
        batch.append(torch.tensor([*document, 1][:seq_len]))
        lengths = torch.tensor([len(row) for row in batch])
        if lengths.sum() >= tokens:
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            yield ids, torch.arange(ids.shape[1]) < lengths[:, None]
            batch = []


def plain_loss(model: torch.nn.Module, ids: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """LLaDA's published training step, full logits."""
    t = torch.rand(len(ids)).clamp(min=1e-3)
    is_masked = (torch.rand(ids.shape) < t[:, None]) & is_token
    logits = model(input_ids=torch.where(is_masked, 2, ids), attention_mask=is_token.long()).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    return (losses * is_masked / t[:, None]).sum() / is_token.sum()


def our_loss(denoiser: Denoiser, objective: Objective) -> Callable[..., torch.Tensor]:
    """Build the loss of our trainer, nats per token."""

    def loss_of(ids: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        key = NoiseKey(seed=0, step=0, rows=torch.arange(len(ids)), total_rows=len(ids))
        rows = CleanRows(x_0=ids, segment_ids=is_token.long(), is_target=is_token, has_padding=False)
        return problem_loss(denoiser, objective.problem(rows, key), num_rows=len(ids))[0] / is_token.sum()

    return loss_of


def measure_block(name: str, way: str, block_size: str) -> dict[str, float]:
    """Time forward and backward of block diffusion: one pass of [x_t ; x_0], or a pass of each with all logits.

    "Under a mask" is one pass whose attention computes all pairs. Process time, under bfloat16 autocast.
    """
    size, vocab_size, seq_len, rows = MODELS[name]
    torch.manual_seed(0)
    keep_freed_memory()
    settings = DiffusionSettings(mask_token_id=2)
    model = build_model(ModelConfig(size=size), settings, tokenizer=Tokens(vocab_size))
    process = MaskedDiffusion(mask_token_id=2)
    ids = torch.randint(3, vocab_size, (rows, seq_len))
    is_token = torch.ones_like(ids, dtype=torch.bool)
    wanted = "mask" if way == "under a mask" else "auto"
    attention = choose_attention(model, wanted, device=torch.device("cpu"), dtype=torch.bfloat16)
    blocks = Denoiser(model, settings, attention=attention)
    ours = our_loss(blocks, Diffusion(process=process, block_size=int(block_size)))
    masked = our_loss(Denoiser(model, settings), Diffusion(process=process))

    def two_passes(ids: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        clean = model(input_ids=ids).logits.float()
        return plain_loss(model, ids, is_token) + 0 * clean.sum()

    loss_of = {"one pass": ours, "under a mask": ours, "two passes": two_passes, "masked diffusion": masked}[way]
    seconds = []
    for _ in range(4):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids, is_token)
        loss.backward()
        model.zero_grad()
        seconds.append(time.process_time() - start)
    return {"seconds": statistics.median(seconds[1:])}


def measure_head(way: str, vocab_size: str, tokens: str) -> dict[str, float]:
    """Take head and cross-entropy, forward and backward; peak memory above that of the weights, in MB; process time."""
    head = torch.nn.Linear(1024, int(vocab_size), bias=False)
    hidden = torch.randn(int(tokens), 1024, requires_grad=True)
    targets = torch.randint(0, int(vocab_size), (int(tokens),))
    torch.nn.functional.linear(hidden[:8], head.weight).sum().backward()  # the gradients' own memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if way == "plain":
        loss = F.cross_entropy(head(hidden), targets, reduction="sum")
    else:
        loss, _ = chunked_loss(
            head, hidden, lambda logits, part: F.cross_entropy(logits, targets[part], reduction="none")
        )
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak_mb": peak / 1024, "seconds": time.process_time() - start}


def measure_lora(way: str, folder: str) -> dict[str, float]:
    """Take steps of a 135 M model under bfloat16 autocast, 4 rows of 256; peak memory of the steps, model included.

    Linux only: what loading took is left out of the peak. Seconds are process time.
    """
    before, rank = _memory_mb("VmRSS"), 16
    torch.manual_seed(0)
    dtype = torch.float32 if "full" in way else torch.bfloat16  # frozen weights need no master copy
    quantization = next((name for name in UNDER_ADAPTERS if name in way), None)
    model = load(folder, dtype=dtype, device="cpu", quantization=quantization).model.train()
    if "full" not in way:
        add_adapter(model, AdapterConfig(rank=rank, targets="all-linear"))
    if "checkpointing" in way:
        enable_checkpointing(model)
    settings = DiffusionSettings(mask_token_id=2)
    loss_of = our_loss(Denoiser(model, settings), Diffusion(process=MaskedDiffusion(mask_token_id=2)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(3, model.config.vocab_size, (4, 256))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = []
    for _ in range(4):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids, torch.ones_like(ids, dtype=torch.bool))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    peak = _memory_mb("VmHWM") - before
    return {"peak_mb": peak, "seconds": statistics.median(seconds[1:]), "trained": num_parameters(model)[0] / 1e6}


def _memory_mb(kind: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def print_lora() -> None:
    """Compare the memory and time of a step, one process each."""
    size, vocab_size, _, _ = MODELS["smollm"]
    print("| way | trained, M | peak MB | x full | CPU seconds per step | x full |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        settings = DiffusionSettings(mask_token_id=2)
        build_model(ModelConfig(size=size), settings, tokenizer=Tokens(vocab_size)).save_pretrained(folder)
        kinds = ("full", "LoRA", *(f"LoRA over {quantization}" for quantization in UNDER_ADAPTERS))
        ways = [kind + more for more in ("", ", checkpointing") for kind in kinds]
        found = {way: _in_a_process(way, folder, kind="lora") for way in ways}
    full = found["full"]
    for way, each in found.items():
        memory = f"{each['peak_mb']:,.0f} | {each['peak_mb'] / full['peak_mb']:.2f}"
        took = f"{each['seconds']:.2f} | {each['seconds'] / full['seconds']:.2f}"
        print(f"| {way} | {each['trained']:.2f} | {memory} | {took} |")


def print_block(models: list[str], block_size: int, rounds: int) -> None:
    """Compare in turns; medians of ratios per round."""
    columns = "one pass, CPU s | under a mask, CPU s | two naive passes, CPU s"
    print(f"| model | block | {columns} | one / under a mask | one / two | one / masked diffusion |")
    print("|---|---|---|---|---|---|---|---|")
    for name in models:
        ways = ("one pass", "under a mask", "two passes", "masked diffusion")
        found = [
            {way: _in_a_process(name, way, str(block_size), kind="block")["seconds"] for way in ways}
            for _ in range(rounds)
        ]
        seconds = " | ".join(f"{statistics.median(each[way] for each in found):.2f}" for way in ways[:3])
        ratios = " | ".join(f"{statistics.median(e['one pass'] / e[way] for e in found):.2f}" for way in ways[1:])
        print(f"| {name} | {block_size} | {seconds} | {ratios} |", flush=True)


def print_head(vocab_size: int, tokens: int) -> None:
    """Compare peak memory and time."""
    plain, chunked = (_in_a_process(way, str(vocab_size), str(tokens), kind="head") for way in ("plain", "chunked"))
    print("| vocabulary | tokens | plain, MB | chunked, MB | chunked / plain | plain, CPU s | chunked, CPU s |")
    print("|---|---|---|---|---|---|---|")
    share = chunked["peak_mb"] / plain["peak_mb"]
    numbers = f"{plain['peak_mb']:,.0f} | {chunked['peak_mb']:,.0f} | {share:.3f}"
    print(f"| {vocab_size:,} | {tokens:,} | {numbers} | {plain['seconds']:.1f} | {chunked['seconds']:.1f} |")


def measure(name: str, way: str, dtype: str, steps: str) -> dict[str, float]:
    """Train some steps; return useful tokens per second, peak memory and model FLOPs per second."""
    size, vocab_size, seq_len, rows = MODELS[name]
    corpus = documents()
    tokenizer = train_tokenizer(corpus, vocab_size=4096)
    token_lists = encode_documents(tokenizer, corpus)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    settings = DiffusionSettings(mask_token_id=2)
    model = build_model(ModelConfig(size=size), settings, tokenizer=Tokens(vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if way == "plain":
        batches = plain_batches(token_lists, tokens=rows * seq_len, seq_len=seq_len)
        loss_of: Callable[..., torch.Tensor] = lambda ids, is_token: plain_loss(model, ids, is_token)  # noqa: E731
    else:
        if "memory returned" not in way:
            keep_freed_memory()
        if "compiled" in way:
            model.base_model.compile()
        windows, _ = pack(token_lists, seq_len=seq_len, eos_token_id=1)
        ids_of = torch.from_numpy(windows.input_ids).long().split(rows)
        batches = ((ids, torch.ones_like(ids, dtype=torch.bool)) for ids in ids_of)
        loss_of = our_loss(Denoiser(model, settings), Diffusion(process=MaskedDiffusion(mask_token_id=2)))

    useful, seconds = [], []
    for _, (ids, is_token) in zip(range(int(steps) + 2), batches, strict=False):
        start = time.perf_counter()
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            loss = loss_of(ids, is_token)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        useful.append(int(is_token.sum()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rate = sum(useful[2:]) / sum(seconds[2:])
    embedding = model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embedding.numel()
    shape = ModelConfig(size=size).dimensions
    flops = 6 * body + 6 * embedding.numel() / 2 + 12 * shape.layers * shape.hidden * seq_len
    return {"tokens_per_second": rate, "peak_mb": peak / 1024, "flops_per_second": rate * flops}


def matmul_rate(name: str, dtype: str) -> float:
    """Multiply matrices of the model's feed-forward shape: FLOPs per second, best of 20."""
    shape, (_, _, seq_len, rows) = ModelConfig(size=MODELS[name][0]).dimensions, MODELS[name]
    a = torch.randn(rows * seq_len, shape.hidden, dtype=DTYPES[dtype])
    b = torch.randn(shape.intermediate, shape.hidden, dtype=DTYPES[dtype])
    best = min(_time(lambda: F.linear(a, b)) for _ in range(20))
    return 2 * a.numel() * shape.intermediate / best


def _time(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _in_a_process(*arguments: str, kind: str = "step") -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", kind, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3, help="pairs of processes")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per process")
    parser.add_argument("--block", type=int, help="block size: compare block diffusion's step")
    parser.add_argument("--head", type=int, help="vocabulary: compare the memory of head and loss")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of --head")
    parser.add_argument("--lora", action="store_true", help="compare full finetuning, LoRA and QLoRA")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, *rest = args.measure
        measures = {"step": measure, "block": measure_block, "head": measure_head, "lora": measure_lora}
        print(json.dumps(measures[kind](*rest)))
        return
    print(describe(Path(__file__).name, sys.argv[1:]))
    if args.block:
        print_block(args.models, args.block, args.rounds)
    if args.head:
        print_head(args.head, args.tokens)
    if args.lora:
        print_lora()
    if args.block or args.head or args.lora:
        return
    print("| model | dtype | way | useful tokens/s | x plain | peak MB | x plain | of the matmul rate |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for dtype in args.dtypes:
            ways = ["plain", "ours"] + (["ours, compiled", "ours, compiled, memory returned"] if name == "demo" else [])
            rounds = [
                {way: _in_a_process(name, way, dtype, str(args.steps)) for way in ways} for _ in range(args.rounds)
            ]
            peak_rate = matmul_rate(name, dtype)
            for way in ways:
                speed = statistics.median(r[way]["tokens_per_second"] for r in rounds)
                memory = statistics.median(r[way]["peak_mb"] for r in rounds)
                used = statistics.median(r[way]["flops_per_second"] for r in rounds) / peak_rate
                faster = statistics.median(
                    r[way]["tokens_per_second"] / r["plain"]["tokens_per_second"] for r in rounds
                )
                smaller = statistics.median(r[way]["peak_mb"] / r["plain"]["peak_mb"] for r in rounds)
                share = f"{100 * used:.0f} %" if way != "plain" else ""
                numbers = f"{speed:,.0f} | {faster:.2f} | {memory:,.0f} | {smaller:.2f} | {share}"
                print(f"| {name} | {dtype} | {way} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
