"""How a run optimises, in transformers' words."""

from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from redraft.errors import unknown_name
from redraft.training.config import TrainConfig
from redraft.training.machine import runs_on_cpu

LOGGERS = ("tensorboard", "wandb", "trackio")


def arguments_of(train: TrainConfig, *, out: str, **more: Any) -> TrainingArguments:
    """Say in transformers' words how every run optimises, whatever it trains."""
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=train.batch_size // PartialState().num_processes,
        gradient_accumulation_steps=train.accumulation,
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.decay, train.decay),
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        adam_beta2=train.beta_2,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=train.precision == "bfloat16",
        use_cpu=runs_on_cpu(train.device),
        seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        save_steps=train.save_every,
        save_total_limit=train.keep_checkpoints,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=_installed(train.report_to),
        **more,
    )
    # One process drives one device: transformers would replicate the model by threads over all that it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _installed(loggers: tuple[str, ...]) -> list[str]:
    """Check the loggers. TensorBoard is left out where it is not installed: it is a default, not a wish."""
    for name in loggers:
        if name not in LOGGERS:
            raise unknown_name("train.report_to", name, LOGGERS)
    missing = [name for name in loggers if find_spec(name) is None]
    if wished := [name for name in missing if name != "tensorboard"]:
        raise ValueError(f"train.report_to names {', '.join(wished)}, which is not installed. Install or leave it out.")
    return [name for name in loggers if name not in missing]
