"""Prometheus text for GET /metrics, under SGLang's names and the few of vLLM's that RL controllers read."""

from collections.abc import Iterator

from fullarc.engine.scheduler import Request, Scheduler

_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Cumulative buckets in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[next((i for i, bound in enumerate(_BUCKETS) if value <= bound), len(_BUCKETS))] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """The histogram in Prometheus' text format."""
        yield f"# TYPE {name} histogram"
        running = 0
        for bound, count in zip((*map(str, _BUCKETS), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {running}"


class Latencies:
    """Time to first token and end-to-end time of finished requests."""

    def __init__(self) -> None:
        self.first_token, self.end_to_end = Histogram(), Histogram()

    def observe(self, request: Request) -> None:
        """Count one finished request."""
        if request.first_token:
            self.first_token.add(request.first_token - request.arrived)
        self.end_to_end.add(request.ended - request.arrived)


def prometheus(s: Scheduler, latencies: Latencies, busy_s: float) -> str:
    """All metrics as text."""
    used = sum(request.computed for request in list(s.running.values()))
    usage = used / (s.core.cache.slots * s.max_len)
    c = s.counters
    hit_rate = c.cached_tokens / c.prompt_tokens if c.prompt_tokens else 0.0
    gauges = {
        "sglang:num_running_reqs": len(s.running),
        "sglang:num_queue_reqs": len(s.waiting),
        "sglang:num_paused_reqs": len(s.running) if s.paused else 0,
        "sglang:num_used_tokens": used,
        "sglang:token_usage": usage,
        "sglang:cache_hit_rate": hit_rate,
        "sglang:gen_throughput": c.generated_tokens / busy_s if busy_s else 0.0,
        "vllm:num_requests_running": len(s.running),
        "vllm:num_requests_waiting": len(s.waiting),
        "vllm:kv_cache_usage_perc": usage,
    }
    counters = {
        "sglang:prompt_tokens_total": c.prompt_tokens,
        "sglang:generation_tokens_total": c.generated_tokens,
        "sglang:cached_tokens_total": c.cached_tokens,
        "sglang:num_requests_total": c.requests,
        "sglang:num_aborted_requests_total": c.aborted,
        "sglang:num_retracted_reqs_total": c.retracted,
        "fullarc:weight_updates_total": c.weight_updates,
        "fullarc:engine_steps_total": c.steps,
    }
    lines: list[str] = []
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for name, value in values.items():
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
    lines += latencies.first_token.lines("sglang:time_to_first_token_seconds")
    lines += latencies.end_to_end.lines("sglang:e2e_request_latency_seconds")
    return "\n".join(lines) + "\n"
