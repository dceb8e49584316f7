"""Likelihood evaluation against the published estimator run naively: items per second at equal standard error.

    python benchmarks/evaluation.py [--model runs/tiny] [--items 24] [--repeats 6]

Naive: LLaDA's published evaluation: one item at a time, its row repeated to a batch, counts spread evenly over the
batch from a random start, logits over the whole vocabulary at all positions. (The mask token has probability 0 in both;
LLaDA's code leaves it in the softmax.) Ours: `loglikelihoods`. Both
take the same number of samples of the same held-out functions of the standard library, on the same model (without
--model one is trained first, in some seconds). "At equal error" multiplies the ratio of speeds by the ratio of the
variances over repeats with other seeds: what it takes to get the same standard error. Of four choices it is the
differences that must be known; of a continuation of 4 tokens ours sums all 15 masks, so there is no error at all.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe

import redraft
from redraft.evaluation.tasks import TaskOptions, make_task
from redraft.likelihood.config import LikelihoodConfig
from redraft.likelihood.estimate import Request, loglikelihoods, mask_bounds, score_spans
from redraft.likelihood.masks import Masks, draw_masks
from redraft.likelihood.spans import MaskedSpan, WholeRows
from redraft.models.build import build_model
from redraft.models.config import ModelConfig
from redraft.models.denoiser import Denoiser
from redraft.models.settings import DiffusionSettings
from redraft.randomness import uniform

BATCH = 16
SETTINGS = {"texts": (32, 48), "four choices": (32, 24), "short": (48, 4)}  # tokens of context and continuation


def requests(lm: redraft.LanguageModel, context: int, length: int, num_items: int) -> list[Request]:
    """Cut held-out functions to a context and a continuation."""
    found: list[Request] = []
    for item in make_task("infill-stdlib", TaskOptions()).items():
        tokens = lm.encode(item.prompt + item.answer + item.suffix)
        if len(tokens) >= context + length:
            row = tokens[: context + length]
            found.append(Request(context=row[:context], continuation=row[context:], key=len(found)))
        if len(found) == num_items:
            break
    return found


@torch.no_grad()
def published(lm: redraft.LanguageModel, request: Request, *, samples: int, generator: torch.Generator) -> float:
    """Score one item as LLaDA's published evaluation does."""
    mask_token_id = lm.denoiser.settings.mask_token_id
    row = torch.cat([request.context, request.continuation]).repeat(BATCH, 1)
    length, total = len(request.continuation), 0.0
    for _ in range(samples // BATCH):
        first = int(torch.randint(1, length + 1, (), generator=generator))
        counts = torch.linspace(first, first + (BATCH - 1) * length / BATCH, BATCH).round().long()
        counts = (counts - 1) % length + 1
        ranks = torch.rand(BATCH, length, generator=generator).argsort(dim=1).argsort(dim=1)
        is_masked = F.pad(ranks < counts[:, None], (len(request.context), 0))
        logits = lm.logits(torch.where(is_masked, mask_token_id, row))
        logits[..., mask_token_id] = -torch.inf
        nats = F.cross_entropy(logits[is_masked], row[is_masked], reduction="none")
        share = (counts / length)[:, None].expand_as(is_masked)[is_masked]
        total += float((nats / share).sum()) / BATCH
    return -total / (samples // BATCH)


Run = Callable[[int], list[float]]


def measure(runs: list[Run], repeats: int) -> list[tuple[float, float]]:
    """Return processor seconds per run, and the variance over repeats averaged over the items; runs take turns."""
    times: list[list[float]] = [[] for _ in runs]
    values: list[list[list[float]]] = [[] for _ in runs]
    for seed in range(repeats):
        for i, run in enumerate(runs):
            start = time.process_time()
            values[i].append(run(seed))
            times[i].append(time.process_time() - start)
    per_item = [zip(*rows, strict=True) for rows in values]
    variances = [statistics.fmean(statistics.variance(item) for item in items) for items in per_item]
    return list(zip(map(statistics.median, times), variances, strict=True))


def compare(lm: redraft.LanguageModel, name: str, items: int, repeats: int, samples: int) -> str:
    """Measure one setting in both ways and lay it out as a row."""
    asked = requests(lm, *SETTINGS[name], items)
    if name == "four choices":
        asked = [choice for question in four_choices(asked)[: items // 4] for choice in question]

    def errors_of(nats: list[float]) -> list[float]:
        """What must be known well: a choice's lead over the next, or the value itself."""
        if name != "four choices":
            return nats
        return [nats[i] - nats[i + 1] for i in range(len(nats)) if i % 4 < 3]

    def naive(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        return errors_of([published(lm, request, samples=samples, generator=generator) for request in asked])

    def ours(seed: int) -> list[float]:
        config = LikelihoodConfig(num_samples=samples, seed=seed)
        return errors_of([found.nats for found in loglikelihoods(lm.denoiser, asked, config)])

    ours(0)  # warm
    (slow, slow_variance), (fast, fast_variance) = measure([naive, ours], repeats)
    variance = "exact" if fast_variance < 1e-9 else f"{slow_variance / fast_variance:.1f}"
    equal = "exact" if variance == "exact" else f"{slow * slow_variance / (fast * fast_variance):.1f}"
    speeds = f"{len(asked) / slow:.1f} | {len(asked) / fast:.1f} | {slow / fast:.1f}"
    return f"| {name}: {' + '.join(map(str, SETTINGS[name]))} | {speeds} | {variance} | {equal} |"


def four_choices(asked: list[Request]) -> list[list[Request]]:
    """Make questions: the right continuation first, then those of the next three items."""
    return [
        [Request(context=r.context, continuation=asked[(i + j) % len(asked)].continuation, key=i) for j in range(4)]
        for i, r in enumerate(asked)
    ]


def draw(scheme: str, length: int, samples: int, *, key: int, seed: int) -> Masks:
    """Draw masks as `draw_masks` does ("weighted"), or by a scheme that the package does not have."""
    if scheme == "weighted":
        return draw_masks(length, samples, key=key, seed=seed)
    index = torch.arange(samples)
    stratum = uniform(seed, key, 0, index, 0)
    order = uniform(seed, key, 0, index[:, None], torch.arange(length), 1).argsort(dim=1).argsort(dim=1)
    count = ((stratum if scheme == "independent" else (index + stratum) / samples) * length).long() + 1
    if scheme == "antithetic":  # the second half masks the complements of the first, and one token more
        half = samples // 2
        count = torch.cat([count[:half], length + 1 - count[:half]])
        order = torch.cat([order[:half], length - 1 - order[:half]])
    return Masks(is_masked=order < count[:, None], weight=length / (count * samples).double())


def by_scheme(
    lm: redraft.LanguageModel, asked: list[Request], scheme: str, *, control: bool, samples: int, seed: int
) -> list[float]:
    """Estimate requests with a scheme of masks, with or without control variates."""
    spans = [
        MaskedSpan(
            tokens=one.tokens,
            masks=draw(scheme, len(one.continuation), samples, key=one.key, seed=seed),
            context_len=len(one.context),
        )
        for one in asked
    ]
    scores = score_spans(spans, WholeRows(lm.denoiser, spans, hides_context=False))
    if control:
        return [span.masks.estimate(scores[span][..., 0])[0] for span in spans]
    return [float((scores[span][..., 0].sum(dim=1) * span.masks.weight).sum()) for span in spans]


def variances(lm: redraft.LanguageModel, items: int, repeats: int, samples: int) -> list[str]:
    """Measure what each idea takes off the variance over seeds: of a text, and of a question's lead."""
    texts = requests(lm, *SETTINGS["texts"], items)
    questions = four_choices(requests(lm, *SETTINGS["four choices"], items))
    apart = [[replace(one, key=4 * one.key + j) for j, one in enumerate(row)] for row in questions]

    def of_texts(scheme: str, control: bool) -> Run:
        return lambda seed: by_scheme(lm, texts, scheme, control=control, samples=samples, seed=seed)

    def of_leads(rows: list[list[Request]], *, control: bool = True) -> Run:
        asked = [one for row in rows for one in row[:2]]

        def leads(seed: int) -> list[float]:
            nats = by_scheme(lm, asked, "weighted", control=control, samples=samples, seed=seed)
            return [first - second for first, second in zip(nats[::2], nats[1::2], strict=True)]

        return leads

    schemes = [("independent", False), ("stratified", False), ("antithetic", False), ("weighted", False)]
    schemes += [("stratified", True), ("antithetic", True), ("weighted", True)]
    base, *others = [variance for _, variance in measure([of_texts(*one) for one in schemes], repeats)]
    leads = [of_leads(apart, control=False), of_leads(questions, control=False), of_leads(apart), of_leads(questions)]
    separate, *shared = [variance for _, variance in measure(leads, repeats)]
    names = [
        "counts stratified over the samples",
        "and masks in antithetic pairs",
        "stratified, small counts more often",
    ]
    names += [
        "stratified, control variates",
        "antithetic pairs, control variates",
        "small counts more often, control variates",
    ]
    leads_of = ["shared noise", "control variates", "shared noise and control variates"]
    return [
        "| idea | variance falls by |",
        "|---|---|",
        *(f"| {name} | {base / variance:.2f} |" for name, variance in zip(names, others, strict=True)),
        *(
            f"| four choices, lead of the first over the second: {name} | {separate / variance:.2f} |"
            for name, variance in zip(leads_of, shared, strict=True)
        ),
    ]


def blocks(lm: redraft.LanguageModel, items: int, samples: int) -> list[str]:
    """Measure what running clean blocks once saves: an untrained model with blocks of 16, four choices."""
    settings = DiffusionSettings(mask_token_id=lm.denoiser.settings.mask_token_id, block_size=16)
    generator = torch.Generator().manual_seed(0)
    lines = ["| context + continuation | rows: positions | shared blocks: positions | faster |", "|---|---|---|---|"]
    torch.manual_seed(0)
    model = build_model(ModelConfig(size="5m", max_positions=1024), settings, tokenizer=lm.tokenizer).eval()
    denoiser = Denoiser(model, settings)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].numel()))
    for context, length in ((32, 24), (512, 24)):
        draw = lambda n: torch.randint(10, 1000, (n,), generator=generator)  # noqa: E731
        asked = [
            [Request(context=c, continuation=draw(length)) for _ in range(4)] for c in map(draw, [context] * items)
        ]
        positions, seconds = [], []
        config = LikelihoodConfig(num_samples=samples)
        for shares_blocks in (False, True):
            fed.clear()
            start = time.process_time()
            for choices in asked:
                mask_bounds(denoiser, choices, config, shares_blocks=shares_blocks)
            seconds.append(time.process_time() - start)
            positions.append(sum(fed))
        lines.append(f"| {context} + {length} | {positions[0]} | {positions[1]} | {seconds[0] / seconds[1]:.1f} |")
    return lines


def main() -> None:
    """Train or load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--variance-repeats", type=int, default=24, help="seeds of the table of variances")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "tiny")
        if args.model is None:
            command = [sys.executable, "-m", "redraft.cli", "train", "stdlib-tiny", "--out", model]
            subprocess.run(command, check=True, capture_output=True)
        lm = redraft.load(model)
    print(describe("evaluation.py", sys.argv[1:]), end="\n\n")
    print("| tokens | naive items/s | ours items/s | faster | variance ratio | at equal error |")
    print("|---|---|---|---|---|---|")
    for name in SETTINGS:
        print(compare(lm, name, args.items, args.repeats, args.samples), flush=True)
    print("\n" + "\n".join(variances(lm, args.items, args.variance_repeats, args.samples)))
    print("\n" + "\n".join(blocks(lm, 2, args.samples)))


if __name__ == "__main__":
    main()
