"""What the tests of many processes launch: several runs one after the other, as most of the time goes into starting."""

import sys
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from redraft.training import run as run_module
from redraft.training.config import RunConfig
from redraft.training.trainer import DiffusionTrainer

save_model, score = run_module.save_model, DiffusionTrainer.score


def save_and_note_sharding(trainer, folder):
    """Leave a file that says which weights are in parts."""
    if trainer.is_world_process_zero():
        sharded = [name for name, weight in trainer.model.named_parameters() if isinstance(weight, DTensor)]
        (folder / "sharded.txt").write_text("\n".join(sharded))
    save_model(trainer, folder)


def poison_second_step_of_one_process(self, objective, batch, key, **settings):
    """Make the loss of one step infinite in one of the processes."""
    total, nats = score(self, objective, batch, key, **settings)
    return (total * torch.inf if key.step == 1 and self.args.process_index == 1 else total), nats


run_module.save_model = save_and_note_sharding
for path in map(Path, sys.argv[1:]):
    is_poisoned = path.stem.endswith("-skips")
    DiffusionTrainer.score = poison_second_step_of_one_process if is_poisoned else score
    run_module.run(RunConfig.read(path), resume=path.stem.endswith("-resumed"), console=Console(quiet=True))
