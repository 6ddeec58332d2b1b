"""What /metrics says, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from btp_export.serving.gathering import Finish

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one application, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("btp_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._gone = Counter("btp_requests_gone", "Requests whose client went away.", registry=registry)
        self._tokens = Counter("btp_tokens", "Tokens of prompts (unpruned) and answers.", ["kind"], registry=registry)
        self._image_tokens = Counter("btp_image_tokens", "Image tokens before pruning.", registry=registry)
        self._kept = Counter("btp_kept_tokens", "Image tokens that each stage kept.", ["stage"], registry=registry)
        self._same = Counter(
            "btp_same_pictures", "Answers about the pictures of the batch before: no vision.", registry=registry
        )
        self._batch = Histogram(
            "btp_batch_requests", "Requests in a batch.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self._seconds = {
            part: Histogram(f"btp_{part}_seconds", words, registry=registry, buckets=SECONDS)
            for part, words in {
                "request": "From a request's first byte to the end of its answer.",
                "queue": "Waiting for a batch.",
                "prefill": "Vision and prefill of the request's batch.",
                "decode": "From the first token to the last.",
            }.items()
        }

    def gauge(self, name: str, words: str, value: Callable[[], float]) -> None:
        """A number that is asked for when it is read."""
        Gauge(f"btp_{name}", words, registry=self._registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        """A request got its status."""
        self._requests.labels(path, str(status)).inc()

    def gone(self) -> None:
        """A client went away before its answer was whole."""
        self._gone.inc()

    def finished(self, finish: Finish, seconds: float) -> None:
        """An answer is whole, `seconds` after its request began."""
        self._tokens.labels("prompt").inc(finish.prompt_tokens)
        self._tokens.labels("answer").inc(finish.completion_tokens)
        self._image_tokens.inc(finish.image_tokens)
        for stage, count in enumerate(finish.tokens_kept):
            self._kept.labels(str(stage)).inc(count)
        self._same.inc(finish.same_pictures)
        self._batch.observe(finish.batch)
        parts = {"queue": finish.queue_seconds, "prefill": finish.prefill_seconds, "decode": finish.decode_seconds}
        for part, value in (parts | {"request": seconds}).items():
            self._seconds[part].observe(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
