"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("hf_vla_requests", "Messages answered, errors included.", registry=registry)
        self.errors = Counter("hf_vla_errors", "Messages and connections refused.", ["kind"], registry=registry)
        self.latency = Histogram(
            "hf_vla_request_seconds", "From a message's arrival to its answer.", buckets=SECONDS, registry=registry
        )
        self.inference = Histogram(
            "hf_vla_inference_seconds", "Of a call of the model.", buckets=SECONDS, registry=registry
        )
        self.batch = Histogram(
            "hf_vla_batch_requests",
            "Requests that shared a call of the model.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.connections = Gauge("hf_vla_connections", "Clients connected.", registry=registry)
        self.queue = Gauge("hf_vla_queue_length", "Requests that wait for the model.", registry=registry)

    def observe_call(self, requests: int, seconds: float) -> None:
        """Count a call of the model."""
        self.batch.observe(requests)
        self.inference.observe(seconds)

    def to_text(self) -> str:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry).decode()
