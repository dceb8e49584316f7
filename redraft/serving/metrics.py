"""What the server counts, in the format of Prometheus. No label holds text of a client."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_OF_NOW = ("rows_running", "rows_waiting", "max_rows")
_TOKENS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """Counts of one server; those of the engine are read from `stats` when somebody asks."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self.registry, self._stats = CollectorRegistry(auto_describe=False), stats
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("redraft_requests", "Requests.", ["endpoint", "status"], **options)
        self.rejected = Counter("redraft_rejected", "Requests that were not run.", ["reason"], **options)
        self.prompt_tokens = Counter("redraft_prompt_tokens", "Tokens of prompts that were answered.", **options)
        self.new_tokens = Counter("redraft_completion_tokens", "Tokens of finished answers.", **options)
        self.first_text = Histogram(
            "redraft_ttfb_seconds", "Time to the first decided text.", buckets=_SECONDS, **options
        )
        self.per_token = Histogram("redraft_token_seconds", "Seconds per new token.", buckets=_SECONDS, **options)
        self.per_forward = Histogram(
            "redraft_tokens_per_forward", "New tokens per forward of an answer.", buckets=_TOKENS, **options
        )
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yield the engine's numbers: all but the sizes of now only grow."""
        for name, value in self._stats().items():
            kind = GaugeMetricFamily if name in _OF_NOW else CounterMetricFamily
            yield kind(f"redraft_{name}", f"Of the engine: {name.replace('_', ' ')}.", value=value)

    def finish(self, usage: Mapping[str, Any], *, seconds: float) -> None:
        """Count a finished answer."""
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.new_tokens.inc(usage["completion_tokens"])
        if usage["completion_tokens"]:
            self.per_token.observe(seconds / usage["completion_tokens"])
        if usage["redraft"].get("tokens_per_forward"):
            self.per_forward.observe(usage["redraft"]["tokens_per_forward"])

    def page(self) -> bytes:
        return bytes(generate_latest(self.registry))
