"""What the tests of many processes launch: several runs one after the other, as most of the time goes into starting."""

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch.distributed.tensor import DTensor

from redraft.training import run as run_module
from redraft.training.config import RunConfig

save_model = run_module.save_model


def save_and_note_sharding(trainer, folder):
    """Leave a file that says which weights are in parts."""
    if trainer.is_world_process_zero():
        sharded = [name for name, weight in trainer.model.named_parameters() if isinstance(weight, DTensor)]
        (folder / "sharded.txt").write_text("\n".join(sharded))
    save_model(trainer, folder)


run_module.save_model = save_and_note_sharding
for path in map(Path, sys.argv[1:]):
    config = RunConfig.read(path)
    if path.stem.endswith("-skips"):  # the second step's gradient is not finite, in one of the two processes
        config = replace(config, out=config.out)
    run_module.run(config, resume=path.stem.endswith("-resumed"), console=Console(quiet=True))
