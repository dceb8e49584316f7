"""The settings that others published for their models, task by task, with their scores to compare with.

Settings and scores are those of the README and evaluation scripts of the dLLM repository, whose tables also quote the
models' official scores. They need the tasks' data from the hub, so none of this can be reproduced offline. Differences:
tasks that exist in dLLM's fork of the harness alone are left out, and so is its ban of end tokens at the start.
"""

from dataclasses import dataclass, field
from typing import Any

from redraft.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of the harness with its settings."""

    name: str
    few_shot: int
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `SamplingConfig` and `LikelihoodConfig`."""
    official: float | None = None
    """The score its authors published, in percent."""
    dllm: float | None = None
    """The score that dLLM measured, in percent."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks of one model."""

    model: str
    chat: bool
    tasks: tuple[SuiteTask, ...]
    note: str = "Published settings and scores; not reproducible offline."


def _generated(
    name: str, few_shot: int, tokens: int, official: float | None, dllm: float | None, **more: Any
) -> SuiteTask:
    settings = {"max_new_tokens": tokens, "steps": tokens, "block_size": tokens, **more}
    return SuiteTask(name=name, few_shot=few_shot, settings=settings, official=official, dllm=dllm)


def _scored(name: str, few_shot: int, official: float | None, dllm: float | None, **more: Any) -> SuiteTask:
    return SuiteTask(name=name, few_shot=few_shot, settings=more, official=official, dllm=dllm)


DREAM = {"preset": "dream-entropy", "temperature": 0.1, "top_p": 0.9}

SUITES = {
    "llada-instruct": Suite(
        model="GSAI-ML/LLaDA-8B-Instruct",
        chat=True,
        tasks=(
            _generated("mmlu_pro", 0, 256, 37.0, 36.2),
            _generated("arc_challenge_chat", 0, 512, 88.5, 86.4),
            _generated("gsm8k_cot", 5, 512, 69.4, 74.7),
            _generated("minerva_math", 4, 512, 31.9, 31.9),
        ),
    ),
    "llada-base": Suite(
        model="GSAI-ML/LLaDA-8B-Base",
        chat=False,
        tasks=(
            _generated("gsm8k", 5, 256, 70.3, 70.7),
            _generated("bbh", 3, 256, 49.7, 47.2),
            _generated("minerva_math", 4, 1024, 31.4, 32.4),
            _scored("gpqa_main_n_shot", 5, 25.2, 31.9, num_samples=32, cfg_scale=0.5),
            _scored("truthfulqa_mc2", 0, 46.1, 45.6, num_samples=32, cfg_scale=2.0),
            _scored("arc_challenge", 0, 45.9, 44.1, num_samples=32, cfg_scale=0.5),
            _scored("hellaswag", 0, 70.5, 69.2, num_samples=32, cfg_scale=0.5),
            _scored("winogrande", 5, 74.8, 70.4, num_samples=32),
            _scored("piqa", 0, 73.6, 70.7, num_samples=32, cfg_scale=0.5),
            _scored("cmmlu", 5, 69.9, 69.8, num_samples=32),
            _scored("ceval-valid", 5, 70.5, 70.4, num_samples=32),
            _scored("mmlu", 5, 65.9, 65.9, num_samples=4),
        ),
        note="Published settings and scores; not reproducible offline. dLLM notes no effect of its cfg_scale here.",
    ),
    "dream-instruct": Suite(
        model="Dream-org/Dream-v0-Instruct-7B",
        chat=True,
        tasks=(
            _generated("mmlu_pro", 4, 128, 43.3, 45.5, **DREAM),
            _generated("gsm8k_cot", 0, 256, 81.0, 82.0, **DREAM),
            _generated("minerva_math", 0, 512, 39.2, 48.6, **DREAM),
            _generated("ifeval", 0, 1280, 62.5, 59.7, **DREAM),
        ),
    ),
    "tiny-a2d-mdlm": Suite(
        model="Qwen3-0.6B-diffusion-mdlm-v0.1",
        chat=True,
        tasks=(
            _generated("gsm8k_cot", 5, 256, None, 29.3),
            _generated("bbh", 3, 256, None, 26.7),
            _generated("minerva_math", 0, 256, None, 8.7),
            _generated("mmlu_pro", 0, 256, None, 17.3),
        ),
    ),
    "tiny-a2d-bd3lm": Suite(
        model="Qwen3-0.6B-diffusion-bd3lm-v0.1",
        chat=True,
        tasks=(
            _generated("gsm8k_cot", 0, 256, None, 46.3, block_size=32),
            _generated("bbh", 3, 256, None, 26.6, block_size=32),
            _generated("minerva_math", 0, 256, None, 12.9, block_size=32),
            _generated("mmlu_pro", 0, 256, None, 13.8, block_size=32),
        ),
    ),
    "bert-chat": Suite(
        model="ModernBERT-large-chat-v0.1",
        chat=True,
        tasks=(
            _generated("bbh", 3, 256, None, 25.6, block_size=32),
            _generated("minerva_math", 4, 256, None, 3.6, block_size=32),
            _scored("ceval-valid", 5, None, 26.5, num_samples=32),
            _scored("mmlu", 5, None, 29.6, num_samples=32),
            _scored("winogrande", 5, None, 49.0, num_samples=32),
            _scored("hellaswag", 0, None, 40.9, num_samples=32),
            _scored("cmmlu", 5, None, 26.5, num_samples=32),
        ),
    ),
}


def find_suite(name: str) -> Suite:
    """Find published settings by name. Raises ValueError for an unknown one."""
    if name not in SUITES:
        raise unknown_name("suite", name, SUITES)
    return SUITES[name]
