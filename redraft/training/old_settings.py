"""Settings in a recipe.json of an earlier version, as `section.name`: read, or refused by one line. No torch."""

from typing import Any

RENAMED = {"train.keep_checkpoints": "max_checkpoints"}
NEW_VALUES = {("data.kind", "thought"): "redraft.latent.words:prepare_words"}
IGNORED = {
    "data.cache_dir",
    "data.chat.block_size",  # read with data.chat.eos to-block-end, which is refused
    "data.thought.fill",  # follows from the objective
    "objective.cart_p",  # read with objective.weighting cart, which is refused
    "train.eval_every",
    "train.eval_windows",
    "train.final_eval_windows",
    "train.log_every",
    "train.report_to",
}
"""Settings that change no weights."""
_SIZE = (None, "write it into model.size (1m,layers=3)")
_FORM = "write it into data.source: countdown:direct, countdown:pause, countdown:written:padded"
FIXED = {
    "data.chat.eos": ("train", "to-block-end is data.chat.eos_block N, with the N of data.chat.block_size"),
    "data.chat.skip_bad": (False, "a malformed record is always an error"),
    "data.chat.too_long": ("cut", "a conversation that is too long always loses the left of its prompt"),
    "data.shuffle_seed": (0, "training documents are always shuffled, with seed 0"),
    "data.thought.form": ("written", _FORM),
    "data.thought.pad_prompt": (False, _FORM),
    "data.validation_windows": (64, "validation takes the first 64 held-out windows of a stream"),
    "model.hidden_size": _SIZE,
    "model.num_layers": _SIZE,
    "model.num_heads": _SIZE,
    "model.intermediate_size": _SIZE,
    "objective.weighting": ("bound", "cart is objective.cart P, with the P of objective.cart_p"),
    "adapter.dropout": (0.0, "adapters have no dropout"),
    "train.attention": ("auto", "it is chosen by the device; train.compile off does without flex attention"),
    "train.device": ("auto", "CUDA_VISIBLE_DEVICES= trains on the CPU"),
    "train.max_grad_norm": (1.0, "gradients are always clipped to norm 1"),
    "train.max_skipped": (10, "a run always stops after 10 skipped steps"),
    "autoencoder.kind": ("chunk", "autoencoder.encoder alone makes a resampler, the other kind that is left"),
    "autoencoder.num_layers": (None, "the autoencoder is linear"),
    "autoencoder.latent_noise": (1.0, "it is always 1"),
    "autoencoder.token_dropout": (0.0, "no token is hidden"),
    "autoencoder.kl_weight": (1e-4, "it is always 1e-4"),
    "denoiser.schedule": ("flow", "the schedule is always that of flow matching"),
    "denoiser.shift": (1.0, "times are not shifted"),
    "denoiser.parametrization": ("x0", "the denoiser always predicts x0"),
    "denoiser.answer": ("autoregressive", "answers are always decoded from left to right"),
    "objective.copies": (1, "it is always 1"),
    "objective.self_conditioning": (0.5, "it is always 0.5"),
    "objective.drop_prompt": (0.1, "it is always 0.1"),
    "objective.context_noise": (0.1, "it is always 0.1"),
    "objective.joint": (0.1, "it is always 0.1"),
    "objective.stop_weight": (0.1, "it is always 0.1"),
    "objective.time_mean": (1.0, "it is always 1"),
    "objective.time_std": (1.0, "it is always 1"),
    "rollout.steps": (5, "it is always 5"),
    "rollout.weight": (1.0, "it is always 1"),
    "rollout.thought_weight": (1.0, "it is always 1"),
    "rollout.answer_gradient": (False, "no gradient passes from the answer into the thoughts"),
}
"""Settings that were removed: the only value that is left, which is not read, and what to do about any other."""


def with_new_names(saved: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Rename old settings and leave out those that say nothing new.

    Raises ValueError that lists all settings of which another value is left.
    """
    refused: list[str] = []
    new = _with_new_names(saved, "", refused)
    if refused:
        raise ValueError(f"{where} has settings that were removed. Delete them from the file: {'; '.join(refused)}.")
    return new


def _with_new_names(saved: dict[str, Any], section: str, refused: list[str]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in saved.items():
        full = section + name
        if full in FIXED:
            same, instead = FIXED[full]
            if value != same:
                refused.append(f"{full} {value!r}: {instead}")
        elif full in ("data.thought", "rollout") and isinstance(value, dict):
            _with_new_names(value, f"{full}.", refused)
        elif isinstance(value, dict):
            new[name] = _with_new_names(value, f"{full}.", refused)
        elif full not in IGNORED:
            new[RENAMED.get(full, name)] = NEW_VALUES.get((full, value), value) if isinstance(value, str) else value
    return new
