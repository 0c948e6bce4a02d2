"""What the server counts, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_TOKENS = [float(2**power) for power in range(6, 18)]  # 64 to 131,072
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]


class Meters:
    """The metrics of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "reward_requests",
            "Requests answered, by route and status; 499: the client went away.",
            ["route", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "reward_request_seconds",
            "From the head of a request to /score to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.rows = Counter(
            "reward_rows",
            "Rows by what became of them: scored, too_long, failed, dropped.",
            ["outcome"],
            registry=self._registry,
        )
        self.queue = Gauge("reward_queue_rows", "Rows that wait.", registry=self._registry)
        self.batch_tokens = Histogram(
            "reward_batch_tokens",
            "Tokens of a batch, padding among them.",
            buckets=_TOKENS,
            registry=self._registry,
        )
        self.errors = Counter(
            "reward_model_errors", "Batches on which the model failed.", registry=self._registry
        )
        for outcome in ("scored", "too_long", "failed", "dropped"):
            self.rows.labels(outcome)  # there from the start, at zero

    def text(self) -> bytes:
        """All of them, as a scraper reads them."""
        return generate_latest(self._registry)
