"""`redraft latent check MODEL`: does the autoencoder give its blocks back, clean and noised?"""

from dataclasses import dataclass

import tyro

from redraft.cli.parsing import parse
from redraft.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure an autoencoder on the blocks of its task's held-out prompts: the gate before a denoiser."""

    action: tyro.conf.Positional[str]
    """check"""
    model: tyro.conf.Positional[str]
    """Folder of an autoencoder, or of a model trained on one."""
    task: str | None = None
    """Task whose blocks are measured; by default its own."""


def main(arguments: list[str]) -> int:
    """Print the gate; 1 where it is missed."""
    args = parse(Arguments, arguments, command="latent")
    if args.action != "check":
        raise unknown_name("action", args.action, ["check"])

    from redraft.cli.common import be_quiet, plain_console
    from redraft.data.tasks import find_task
    from redraft.latent.checkpoint import load_autoencoder
    from redraft.latent.gate import gate_failures, measure_gate
    from redraft.training.latent import encode_split

    be_quiet()
    autoencoder, tokenizer = load_autoencoder(args.model)
    autoencoder.require_normalizer()
    name = args.task or autoencoder.config.task
    if name is None:
        raise ValueError(
            "this autoencoder was trained on a task without a name. Give --task, a .jsonl of its examples."
        )
    ids, mask = encode_split(find_task(name), tokenizer, split="validation").real_blocks()
    if ids.shape[1] != autoencoder.config.block_tokens:
        raise ValueError(
            f"the autoencoder takes blocks of {autoencoder.config.block_tokens} tokens; got {ids.shape[1]}. "
            "Give the task it was trained on."
        )
    gate = measure_gate(autoencoder, ids, mask)
    console = plain_console()
    console.print(f"{len(ids)} distinct blocks of held-out prompts")
    for level, share in gate.items():
        console.print(f"relative noise {level:<4}  {100 * share:5.1f} % exact")
    failures = gate_failures(gate)
    console.print("the gate is missed: " + "; ".join(failures) if failures else "the gate is passed")
    return 1 if failures else 0
