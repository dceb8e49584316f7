"""Mixtures of sources: `stories.jsonl:0.3,stdlib:0.7`."""

import heapq
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PART = re.compile(r"(?P<source>.+):(?P<weight>[^:/]+)(/(?P<limit>[^:/]+))?")
SYNTAX = "Write SOURCE:WEIGHT,SOURCE:WEIGHT, with /LIMIT after a weight for the first LIMIT documents only"


class Part(NamedTuple):
    """One source of a mixture."""

    source: str
    weight: float
    limit: int | None
    """Its first documents only."""


def parse_mixture(source: str) -> list[Part] | None:
    """Read `SOURCE:WEIGHT[/LIMIT],...`; None for a text without a comma, which is one source.

    The weight is what follows a part's last colon, so a hub id keeps its own: `owner/name:config@train:0.3`.
    """
    if "," not in source:
        return None
    return [_parse_part(text.strip(), source) for text in source.split(",")]


def _parse_part(text: str, source: str) -> Part:
    match = PART.fullmatch(text)
    weight = _number(match["weight"]) if match else None
    if match is None or weight is None:
        raise ValueError(f"{text!r} in the mixture {source!r} has no weight. {SYNTAX}.")
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(
            f"the weights of a mixture must be positive; got {match['weight']} for {match['source']!r}."
            " Leave a source out to give it none."
        )
    limit = match["limit"]
    if limit is not None and (not limit.isdecimal() or int(limit) < 1):
        raise ValueError(f"the limit of {match['source']!r} must be a number of documents; got {limit!r}. {SYNTAX}.")
    return Part(match["source"], weight, int(limit) if limit else None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def interleave(streams: Sequence[tuple[Iterator[str], float]]) -> Iterator[str]:
    """Take documents in turns so that each stream's share of the text (UTF-8 bytes) follows its weight.

    The next document comes from the stream with the smallest bytes / weight so far: no chance is involved, and any
    beginning of the mixture has the shares, to within one document. Ends when the first stream does, so that no
    document comes twice and the shares hold to the end.
    """
    queue = [(0.0, index) for index in range(len(streams))]
    while True:
        taken, index = heapq.heappop(queue)
        documents, weight = streams[index]
        if (document := next(documents, None)) is None:
            return
        heapq.heappush(queue, (taken + len(document.encode()) / weight, index))
        yield document
