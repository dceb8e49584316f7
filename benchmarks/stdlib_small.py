"""Held-out modules of the standard library: the NELBO of a trained run beside general-purpose compressors.

    redraft train stdlib-small && python benchmarks/stdlib_small.py runs/stdlib-small

The NELBO is averaged over several fixed noises on the same held-out windows; its standard error is taken over windows.
"""

import argparse
import gzip
import lzma
import math
import sys
from pathlib import Path

import torch
from machine import describe

import redraft
from redraft.data.collate import collate, unigram_nats
from redraft.data.prepare import prepare
from redraft.data.tokenizer import token_byte_lengths
from redraft.likelihood.problem import CleanRows, NoiseKey, problem_loss
from redraft.training.config import RECIPE_FILE, RunConfig


def window_nats(lm: redraft.LanguageModel, config: RunConfig, windows: object, *, noises: int) -> torch.Tensor:
    """Estimate the NELBO of each window, averaged over noises; nats."""
    sizes = {"mask_token_id": lm.denoiser.settings.mask_token_id, "vocab_size": lm.model.config.vocab_size}
    objective = config.objective.build(**sizes).evaluation()
    total = torch.zeros(len(windows), dtype=torch.float64)
    for noise in range(noises):
        for index in torch.arange(len(windows)).split(32):
            ids = collate([windows[int(i)] for i in index], pad_token_id=0)["input_ids"]
            key = NoiseKey(seed=noise, step=-1, rows=index, total_rows=len(windows))
            whole = torch.ones_like(ids)
            rows = CleanRows(x_0=ids, segment_ids=whole, is_target=whole.bool(), has_padding=False)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bfloat16"):
                total[index] += problem_loss(lm.denoiser, objective.problem(rows, key), num_rows=len(ids))[1].double()
    return total / noises


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--noises", type=int, default=8)
    args = parser.parse_args()
    config = RunConfig.read(args.folder / RECIPE_FILE)
    data, lm = prepare(config.data), redraft.load(args.folder, device="cpu")
    nats = window_nats(lm, config, data.validation, noises=args.noises)
    ids = torch.cat([data.validation[i]["input_ids"] for i in range(len(data.validation))]).long()
    num_bytes = int(token_byte_lengths(data.tokenizer)[ids].sum())
    text = data.tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()
    error = float(nats.std() * len(nats) ** 0.5) / len(ids)
    mean = float(nats.sum()) / len(ids)
    to_bits = len(ids) / num_bytes / math.log(2)
    unigram = unigram_nats(data.validation, vocab_size=len(data.tokenizer))
    print(describe(f"stdlib_small.py {args.folder}", sys.argv[2:]))
    print(f"{len(nats)} held-out windows, {len(ids):,} tokens, {num_bytes:,} bytes\n")
    print("| | nats per token | bits per byte |")
    print("|---|---|---|")
    print(f"| NELBO, {args.noises} noises | {mean:.4f} ± {error:.4f} | {mean * to_bits:.3f} ± {error * to_bits:.3f} |")
    print(f"| unigram entropy of the same tokens | {unigram:.4f} | {unigram * to_bits:.3f} |")
    print(f"| gzip -9, one stream | | {8 * len(gzip.compress(text, 9)) / len(text):.3f} |")
    extreme = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    print(f"| xz -9e, one stream | | {8 * len(extreme) / len(text):.3f} |")


if __name__ == "__main__":
    main()
