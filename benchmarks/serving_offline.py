"""Generation without a server, for `benchmarks/serving.py`: ours, and transformers' of the autoregressive sibling.

A `paired.Worker`: it reads {"way", "prompts", "new"} line by line, and answers with the seconds that it took.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import redraft

PAGE = 256
"""Tokens of a page of transformers' cache."""
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


class Offline:
    """The ways to generate."""

    def __init__(self, folder: Path, dtype: str, steps_per_block: int) -> None:
        self.lm = redraft.load(folder / "diffusion", device="cpu", dtype=getattr(torch, dtype))
        self.causal = AutoModelForCausalLM.from_pretrained(folder / "causal", dtype=getattr(torch, dtype)).eval()
        self.paged = AutoModelForCausalLM.from_pretrained(folder / "causal", dtype=getattr(torch, dtype)).eval()
        self.steps_per_block = steps_per_block

    def ours(self, prompts: list[list[int]], new: list[int]) -> int:
        """`lm.generate`, all rows of one length."""
        made = self.lm.generate(
            prompts, max_new_tokens=max(new), steps_per_block=self.steps_per_block, temperature=0.0, stop=None
        )
        return sum(map(len, made.tokens))

    def generate(self, prompts: list[list[int]], new: list[int]) -> int:
        """transformers' `generate`, batches of 16 rows in their order, padded to the left, each to its longest row.

        The tokens that a row makes behind its own length are not counted.
        """
        for i in range(0, len(prompts), 16):
            batch, longest = prompts[i : i + 16], max(map(len, prompts[i : i + 16]))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            self.causal.generate(ids, attention_mask=mask, max_new_tokens=max(new[i : i + 16]), **GREEDY)
        return sum(new)

    def continuous(self, prompts: list[list[int]], new: list[int]) -> int:
        """transformers' continuous batching, all requests at once, at most 16 rows in a forward."""
        pages = 16 * -(-max(len(prompt) + one for prompt, one in zip(prompts, new, strict=True)) // PAGE)
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages + 1, max_batch_tokens=1024, max_requests_per_batch=16,
            allow_block_sharing=False,
        )  # fmt: skip
        made: list[Any] = []
        with self.paged.continuous_batching_context_manager(
            generation_config=GenerationConfig(**GREEDY, max_new_tokens=max(new)),
            continuous_batching_config=config, block=True, timeout=5, warmup=False,
        ) as manager:  # fmt: skip
            begun = time.perf_counter()
            for prompt, one in zip(prompts, new, strict=True):
                manager.add_request(prompt, max_new_tokens=one)
            while len(made) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    made.append(result)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has stopped")
            self.seconds = time.perf_counter() - begun  # without its start and end
        return sum(len(one.generated_tokens) for one in made)


def main() -> None:
    """Answer questions until the input ends."""
    set_verbosity_error()
    disable_progress_bar()
    print(json.dumps(str(Path(redraft.__file__).parent)), flush=True)
    offline = Offline(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    for line in sys.stdin:
        asked = json.loads(line)
        offline.seconds, begun = 0.0, time.perf_counter()
        with torch.no_grad():
            tokens = getattr(offline, asked["way"])(asked["prompts"], asked["new"])
        assert tokens == sum(asked["new"]), f"{asked['way']}: {tokens} tokens for {sum(asked['new'])}"
        print(json.dumps(offline.seconds or time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    main()
