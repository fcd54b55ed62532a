"""What a server says about itself: JSON lines for logs, and metrics in Prometheus' text format.

Neither holds texts of users or models, tokens or keys.
"""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from critrm.live import LiveRewardModel

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histogram of how long requests take."""


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, event, and what `extra={"facts": {...}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        row: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        facts = record.__dict__.get("facts")
        row |= facts if isinstance(facts, dict) else {}
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=True, default=str)


def log_json_lines(stream: TextIO | None = None, *, level: int = logging.INFO) -> None:
    """Send the log records of critrm and of the HTTP server to a stream (stderr when None), as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("critrm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class Metrics:
    """The server's metrics: of requests, and of the model and the critic behind them."""

    def __init__(self, live: "LiveRewardModel") -> None:
        """A registry of its own, so that several servers can be in one process."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry: CollectorRegistry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter("critrm_requests", "Answered requests.", labels, registry=self.registry)
        self.seconds = Histogram(
            "critrm_request_seconds", "How long requests took.", ("path",), buckets=SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("critrm_requests_in_flight", "Requests that wait for an answer.", registry=self.registry)
        self.registry.register(_Behind(live))

    def text(self) -> tuple[bytes, str]:
        """The metrics, and their media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _Behind:
    """Reads the counts that model and critic keep, when the metrics are asked for."""

    def __init__(self, live: "LiveRewardModel") -> None:
        self._live = live

    def collect(self) -> Iterator["Metric"]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        batches, live = self._live.batcher.stats, self._live
        counts = {
            "critrm_batches": ("Batches that the model has computed.", batches.n_batches),
            "critrm_prompts_scored": ("Prompts whose completions were scored.", batches.n_prompts),
            "critrm_completions_scored": ("Completions that were scored.", batches.n_completions),
            "critrm_model_seconds": ("Seconds that the model has computed.", batches.seconds),
            "critrm_completions_without_critique": ("Scored so because the critic failed.", live.n_without),
        }
        for name, (help_text, value) in counts.items():
            yield CounterMetricFamily(name, help_text, value=value)
        yield GaugeMetricFamily("critrm_prompts_waiting", "Prompts not scored yet.", value=batches.n_waiting)
        if live.critic:
            stats = live.critic.stats
            critiques = CounterMetricFamily("critrm_critiques", "Critiques by where they came from.", labels=["result"])
            for result in ("answered", "cached", "shared", "failed"):
                critiques.add_metric([result], getattr(stats, f"n_{result}"))
            yield critiques
            yield CounterMetricFamily("critrm_critic_retries", "Calls made again.", value=stats.n_retried)
            yield CounterMetricFamily("critrm_critic_seconds", "Seconds of the answered calls.", value=stats.seconds)
            yield CounterMetricFamily("critrm_critic_dollars", "US dollars spent on the critic.", value=stats.cost)
            yield GaugeMetricFamily("critrm_critic_calls", "Critic calls under way.", value=stats.n_under_way)
