"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)


class Metrics:
    """One registry of its own; only the event loop's thread writes."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector("autoglm_gateway", registry=registry)
        prefix = "autoglm_gateway_"
        self.requests = Counter(
            f"{prefix}requests", "Requests by path and status; 0: left before", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            f"{prefix}request_seconds", "From the head to the end", ["path"], buckets=SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            f"{prefix}first_token_seconds", "To the first piece of an answer", buckets=SECONDS, registry=registry
        )
        self.running = Gauge(f"{prefix}requests_running", "Requests in hand", registry=registry)
        self.prompt_tokens = Counter(f"{prefix}prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter(f"{prefix}completion_tokens", "Tokens of answers", registry=registry)
        self.disconnects = Counter(f"{prefix}disconnects", "Callers who hung up early", registry=registry)
        self.stop_seconds = Histogram(
            f"{prefix}stop_seconds", "Until the server ended what was left", buckets=SECONDS, registry=registry
        )
        self.unstopped = Counter(f"{prefix}unstopped", "What the server did not end in time", registry=registry)

    def finished(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"
        self.requests.labels(path, str(status)).inc()
        self.request_seconds.labels(path).observe(seconds)

    def abandoned(self, seconds: float | None) -> None:
        """A request was left; the server ended it after so many seconds, or not in time (None)."""
        if seconds is None:
            self.unstopped.inc()
        else:
            self.stop_seconds.observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self._registry)
