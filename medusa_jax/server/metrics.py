"""Figures for Prometheus, under the names that vLLM gives them."""

import threading
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from medusa_jax.decoding.state import Output
from medusa_jax.serving.engine import Engine


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, about: str, *labels: str) -> Counter:
            names = ("model_name", *labels)
            return Counter(f"vllm:{name}", about, names, registry=self.registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"vllm:{name}", about, ("model_name",), registry=self.registry)

        self._running = gauge("num_requests_running", "Texts in a slot.")
        self._waiting = gauge("num_requests_waiting", "Texts that wait for a slot.")
        self._slots = gauge("num_slots", "Slots of the engine.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts of texts that have ended.")
        self._text = counter("generation_tokens", "Tokens of texts that have ended.")
        self._ended = counter("request_success", "Texts that have ended.", "finished_reason")
        self._drafts = counter("spec_decode_num_drafts", "Steps that verified a tree.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens of these trees.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Of them, accepted ones.")
        self._at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted, by depth.", "position"
        )
        self._refused = counter("num_requests_refused", "Requests that found the queue full.")
        for metric in (self._running, self._waiting, self._slots):
            metric.labels(model).set(0)
        self._now: dict[Engine, tuple[int, int, int]] = {}
        self._lock = threading.Lock()  # each engine has a thread of its own

    def refuse(self) -> None:
        """Counts a request that found the queue full."""
        self._refused.labels(self._model).inc()

    def ended(self, reason: str) -> None:
        """Counts a text that has ended."""
        self._ended.labels(self._model, reason).inc()

    def observe(self, engine: Engine, texts: int) -> None:
        """Reads an engine between two calls."""
        gauges = self._slots, self._running, self._waiting
        with self._lock:
            self._now[engine] = engine.slots, engine.running, texts - engine.running
            for gauge, figures in zip(gauges, zip(*self._now.values(), strict=True), strict=True):
                gauge.labels(self._model).set(sum(figures))

    def add(self, output: Output) -> None:
        """Counts a text that has ended, and its steps."""
        self.ended(output.finish_reason)
        self._prompt.labels(self._model).inc(len(output.prompt_ids))
        self._text.labels(self._model).inc(len(output.token_ids))
        steps = output.tokens_per_step
        if not output.drafted:
            return
        self._drafts.labels(self._model).inc(output.drafts)
        self._drafted.labels(self._model).inc(output.drafted)
        self._accepted.labels(self._model).inc(sum(steps) - len(steps))
        for position in range(max(steps, default=1) - 1):
            reached = sum(made > position + 1 for made in steps)
            self._at.labels(self._model, str(position)).inc(reached)

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)


def speculation(outputs: Sequence[Output]) -> dict[str, object]:
    """A request's figures, as vLLM's `--per-request-spec-decode-metrics` names them.

    Steps of (3, 1, 2) tokens with trees of 5: 3 of 12 drafted tokens were accepted, and the
    histogram of accepted lengths is (1, 1, 1).
    """
    steps = [made for output in outputs for made in output.tokens_per_step]
    accepted, drafted = sum(steps) - len(steps), sum(output.drafted for output in outputs)
    histogram = [0] * max(steps, default=0)
    for made in steps:
        histogram[made - 1] += 1
    return {
        "mean_acceptance_length": round(sum(steps) / max(len(steps), 1), 4),
        "draft_acceptance_rate": round(accepted / max(drafted, 1), 4),
        "acceptance_histogram": histogram,
        "num_spec_steps": len(steps),
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
    }
