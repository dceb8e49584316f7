"""lm-evaluation-harness over redraft's models: the model name `redraft` for its tasks, its command line and its format.

`python -m redraft.evaluation.harness run --model redraft --model_args pretrained=PATH,steps=64 --tasks ...` is the
harness' own command line, with our model registered.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from accelerate.utils import gather
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from redraft.errors import check_names
from redraft.evaluation.metrics import RATIOS
from redraft.evaluation.run import Store, Summary, join_processes, summarize
from redraft.language_model import LanguageModel, load
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import LogLikelihood, Request, rolling_requests, score_questions
from redraft.sampling.config import SamplingConfig

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256  # the harness' own default of max_gen_toks
FROM_TASK = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_gen_toks": "max_new_tokens"}


@register_model("redraft")
class RedraftLM(TemplateLM):
    """A diffusion language model behind the harness' interface.

    Settings are those of `SamplingConfig` and `LikelihoodConfig`; they win over a task's generation_kwargs. `is_greedy`
    says whether greedy decoding, one token a step, gives the continuation. That needs a generation per request, so it
    is computed only with `exact_match=True`, and else is False; for an autoregressive model it comes with the
    likelihood.
    """

    def __init__(
        self,
        pretrained: str = "",
        lm: LanguageModel | None = None,
        device: str | None = None,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        exact_match: bool = False,
        **settings: Any,  # the harness passes --model_args by name
    ) -> None:
        super().__init__()
        sampling = set(SamplingConfig.setting_names()) - {"stop", "num_samples"}  # num_samples: of a likelihood
        check_names("setting", settings, sorted({*sampling, *LikelihoodConfig.setting_names()}))
        if lm is None and not pretrained:
            raise ValueError("there is no model; pass pretrained=FOLDER in --model_args.")
        self._join_processes()
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # cuda:0 is the default of the harness' command line
        self.lm = lm if lm is not None else load(pretrained, device=device)
        if self.lm.tokenizer is None:
            raise ValueError(f"the harness' tasks need text, and {pretrained or 'this model'} has no tokenizer.")
        self.tokenizer = self.lm.tokenizer
        self.batch_size = int(str(batch_size)) if str(batch_size).isdigit() else 8  # auto, None
        self.exact_match = exact_match
        self.sampling = {k: v for k, v in settings.items() if k in sampling}
        self.likelihood = LikelihoodConfig(
            **{k: v for k, v in settings.items() if k in LikelihoodConfig.setting_names()}
        )
        self.costs: Counter[str] = Counter()
        self._costs_of_all: dict[str, float] | None = None

    def _join_processes(self) -> None:
        state = join_processes()
        self._rank, self._world_size, self._device = state.process_index, state.num_processes, state.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; no request begins with it."""
        return self.lm.eos_token_ids[0] if self.lm.eos_token_ids else -1

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness' cache of chat prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize without special tokens."""
        return self.lm.encode(string).tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages by the chat template. Raises ValueError for a model without one."""
        if self.tokenizer.chat_template is None:
            raise ValueError("this model has no chat template; leave --chat (--apply_chat_template) out.")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; the choices of one question share their noise."""

        def score(questions: list[list[int]]) -> Iterator[tuple[int, tuple[float, bool]]]:
            asked = [[self._request(requests[i]) for i in question] for question in questions]
            for question, choices, results in zip(questions, asked, self._scores(asked), strict=True):
                for i, request, result in zip(question, choices, results, strict=True):
                    is_greedy = result.is_greedy
                    if is_greedy is None:
                        is_greedy = self.exact_match and self._is_greedy(request)
                    yield i, (result.nats, is_greedy)

        def batches(wanted: list[int]) -> list[list[list[int]]]:
            return list(_chunks(_questions(requests, wanted), self.batch_size))

        return self._answers("loglikelihood", requests, batches, score, is_quiet=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise AssertionError("loglikelihood works on whole questions")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in disjoint windows of the model's context, at most 1024 tokens."""
        window = min(self.lm.context_length or 1024, 1024)

        def score(i: int) -> Iterator[tuple[int, float]]:
            tokens = self.lm.encode(requests[i].args[0])
            parts = rolling_requests(tokens, window=window, key=_key(requests[i])) if len(tokens) else []
            yield i, sum(result.nats for (result,) in self._scores([[part] for part in parts]))

        return self._answers("loglikelihood_rolling", requests, list, score, is_quiet=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate; equal prompts (repeats) draw with seeds of their own."""

        def generate(batch: tuple[list[int], int]) -> Iterator[tuple[int, str]]:
            rows, times_before = batch
            texts = self._generate([requests[i] for i in rows], times_before=times_before)
            yield from zip(rows, texts, strict=True)

        def batches(wanted: list[int]) -> list[tuple[list[int], int]]:
            return list(self._batches(requests, wanted))

        return self._answers("generate_until", requests, batches, generate, is_quiet=disable_tqdm)

    def _answers(
        self,
        kind: str,
        requests: Any,
        batches: Callable[[list[int]], list[T]],
        work: Callable[[T], Iterator[tuple[int, Any]]],
        *,
        is_quiet: bool,
    ) -> list[Any]:
        """Answer requests batch by batch; each answer goes to the harness' cache at once."""
        originals = _originals(requests)
        answers: dict[int, Any] = {}
        wanted = batches(sorted(set(originals)))
        for batch in tqdm(wanted, desc=f"redraft {kind}", disable=True if is_quiet or self.rank else None):
            for i, answer in work(batch):
                answers[i] = answer
                self.cache_hook.add_partial(kind, requests[i].args, answer)
        return [answers[i] for i in originals]

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries of the results file: the model, its settings, and the total cost of the answers."""
        settings = {"sampling": self.sampling, "likelihood": vars(self.likelihood)}
        costs = self._costs_of_all or self.costs
        return {"model_num_parameters": self.lm.model.num_parameters(), "redraft": {**settings, **costs}}

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor of every process."""
        return gather(tensor.reshape(-1).to(self._device)) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect an object of every process at one."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for the other processes, and sum the costs of all; the seconds are those of the slowest.

        This must happen here: later the harness calls `get_model_info` in its first process alone.
        """
        if self.world_size > 1:
            gathered: list[Counter[str]] = [Counter()] * self.world_size
            torch.distributed.all_gather_object(gathered, self.costs)
            total = sum(gathered, Counter())
            slowest = {name: max(costs[name] for costs in gathered) for name in total if name.endswith("seconds")}
            self._costs_of_all = {**total, **slowest}

    def _request(self, instance: Any) -> Request:
        context, continuation = self.lm.encode_pair(*instance.args)
        context = self._cut(context, room_for=len(continuation))
        return Request(context=context, continuation=continuation, key=_key(instance))

    def _cut(self, context: Tensor, *, room_for: int) -> Tensor:
        """Cut a context from the left to fit the model's context. Raises ValueError where no room is left at all."""
        limit = self.lm.context_length
        if limit is None or len(context) + room_for <= limit:
            return context
        if room_for > limit:
            raise ValueError(f"{room_for} new or scored tokens do not fit into the model's context of {limit}.")
        self.costs["cut_contexts"] += 1
        self.costs["cut_tokens"] += len(context) + room_for - limit
        if self.costs["cut_contexts"] == 1:
            logger.warning("A context of %d tokens was cut from the left to %d.", len(context), limit - room_for)
        return context[len(context) + room_for - limit :]

    def _scores(self, questions: list[list[Request]]) -> list[list[LogLikelihood]]:
        """Score the choices of questions, and count what it cost."""
        start = time.perf_counter()
        scores = score_questions(self.lm.denoiser, questions, self.likelihood)
        results = [result for choices in scores for result in choices]
        forwards, errors = (sum(getattr(r, name) for r in results) for name in ("forwards", "standard_error"))
        counts = {"items": len(questions), "continuations": len(results), "likelihood_forwards": forwards}
        self.costs.update({**counts, "standard_errors": errors, "seconds": time.perf_counter() - start})
        return scores

    def _is_greedy(self, request: Request) -> bool:
        length = len(request.continuation)
        greedy: dict[str, Any] = {"preset": "llada", "temperature": 0.0, "steps": length, "max_new_tokens": length}
        out = self.lm.generate([request.context], stop=None, **greedy)
        return torch.equal(out.tokens[0], request.continuation)

    def _batches(self, requests: Sequence[Any], wanted: list[int]) -> Iterator[tuple[list[int], int]]:
        """Batch requests with equal settings and different prompts, with the number of equal prompts before each."""
        seen: Counter[str] = Counter()
        keyed = []
        for i in wanted:
            context, kwargs = requests[i].args
            keyed.append((str(sorted(kwargs.items(), key=str)), seen[context], i))
            seen[context] += 1
        for (_, times_before), group in groupby(sorted(keyed), key=lambda entry: entry[:2]):
            for chunk in _chunks([i for _, _, i in group], self.batch_size):
                yield chunk, times_before

    def _generate(self, requests: Sequence[Any], *, times_before: int) -> list[str]:
        kwargs = dict(requests[0].args[1])
        until = kwargs.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        settings = self._sampling_of(kwargs, until, times_before=times_before)
        rows = [self.lm.encode(request.args[0]) for request in requests]
        rows = [self._cut(row, room_for=settings["max_new_tokens"]) for row in rows]
        out = self.lm.generate(rows, **settings)
        assert out.texts is not None
        counts = {"items": len(rows), "tokens": sum(map(len, out.tokens)), "generation_forwards": sum(out.forwards)}
        self.costs.update({**counts, "seconds": out.seconds})
        return [_before(text, until) for text in out.texts]

    def _sampling_of(self, kwargs: dict[str, Any], until: list[str], *, times_before: int) -> dict[str, Any]:
        """Combine settings: the user's, then a task's generation_kwargs; the checkpoint's are used for the others."""
        if kwargs.get("do_sample") is False:
            kwargs = {name: kwargs[name] for name in kwargs if name not in ("temperature", "top_p", "top_k")}
        of_task = {ours: kwargs[theirs] for theirs, ours in FROM_TASK.items() if kwargs.get(theirs) is not None}
        settings = {"max_new_tokens": MAX_NEW_TOKENS, **of_task, **self.sampling}
        settings["seed"] = settings.get("seed", 0) + times_before
        return {**settings, "stop": tuple(filter(None, until)) or "eos"}


def _originals(requests: Sequence[Any]) -> list[int]:
    """Return for each request the one whose answer it gets: the harness pads a process's share with copies."""
    places: dict[int, list[int]] = {}
    originals: list[int] = []
    for i, request in enumerate(requests):
        seen = places.setdefault(id(request), [])
        is_repeat = len(seen) < request.repeats
        originals.append(i if is_repeat else seen[len(originals) % len(seen)])
        if is_repeat:
            seen.append(i)
    return originals


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _questions(requests: Sequence[Any], wanted: list[int]) -> list[list[int]]:
    """Group requests by the question they belong to; those without a context (mutual information) apart."""
    grouped: dict[Any, list[int]] = {}
    for i in wanted:
        request = requests[i]
        grouped.setdefault((request.task_name, request.doc_id, request.args[0] == ""), []).append(i)
    return list(grouped.values())


def _key(instance: Any) -> int:
    """Key the noise by the question: its choices share it, and no batch or process changes it."""
    name = f"{instance.task_name}:{instance.doc_id}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _before(text: str, until: list[str]) -> str:
    for end in until:
        text = text.partition(end)[0] if end else text
    return text


def keep_results(results: dict[str, Any], store: Store) -> list[Summary]:
    """Write the harness' results (harness.json, merged over its tasks), keep each item's scores, and sum them up."""
    from lm_eval.utils import handle_non_serializable

    samples, spent = results.pop("samples"), results["config"].pop("redraft")
    results["redraft"] = dict.fromkeys(samples, spent)
    path = store.folder / "harness.json"
    merged = json.loads(path.read_text()) if path.exists() else {}
    for name, value in results.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    path.write_text(json.dumps(merged, indent=2, default=handle_non_serializable, ensure_ascii=False))
    summaries = []
    for task, items in samples.items():
        records = [
            {
                "id": f"{item['filter']}:{item['doc_id']}",
                "scores": {name: float(item[name]) for name in item["metrics"] if isinstance(item[name], int | float)},
                "ratios": {name: item[name] for name in item["metrics"] if name in RATIOS},
                "forwards": (spent.get("likelihood_forwards", 0) + spent.get("generation_forwards", 0)) / len(items),
                "seconds": spent.get("seconds", 0.0) / len(items),
            }
            for item in items
        ]
        store.replace(task, records)
        summaries.append(summarize(task, records))
    return summaries


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
