"""Prometheus metrics of the gateway."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)


class GatewayMetrics:
    """Uses its own registry instead of the process-wide one. Only the event loop's thread writes."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector("autoglm_gateway", registry=registry)
        prefix = "autoglm_gateway_"
        self.requests = Counter(
            f"{prefix}requests", "Requests by path and status; 0: none was sent", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            f"{prefix}request_seconds", "From the headers to the end", ["path"], buckets=SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            f"{prefix}first_token_seconds", "Time to the first part of an answer", buckets=SECONDS, registry=registry
        )
        self.running = Gauge(f"{prefix}requests_running", "Requests being answered", registry=registry)
        self.prompt_tokens = Counter(f"{prefix}prompt_tokens", "Prompt tokens", registry=registry)
        self.completion_tokens = Counter(f"{prefix}completion_tokens", "Answer tokens", registry=registry)
        self.disconnects = Counter(f"{prefix}disconnects", "Callers that disconnected early", registry=registry)
        self.stop_seconds = Histogram(
            f"{prefix}stop_seconds", "Time to stop an abandoned request", buckets=SECONDS, registry=registry
        )
        self.unstopped = Counter(f"{prefix}unstopped", "Abandoned requests not stopped in time", registry=registry)

    def finished(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"
        self.requests.labels(path, str(status)).inc()
        self.request_seconds.labels(path).observe(seconds)

    def stopped(self, seconds: float | None) -> None:
        """An abandoned request was stopped after `seconds`; None: it was not stopped in time."""
        if seconds is None:
            self.unstopped.inc()
        else:
            self.stop_seconds.observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self._registry)
