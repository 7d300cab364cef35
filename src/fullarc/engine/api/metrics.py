"""Prometheus text for GET /metrics, under SGLang's names and those of vLLM's that RL controllers and dashboards read.

Invariant: everything is counted once, by the engine's thread or at a request's end; reading changes nothing.
"""

from collections.abc import Iterator

from fullarc.engine.draft import MAX_DRAFTS
from fullarc.engine.request import Request
from fullarc.engine.scheduler import Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


class Histogram:
    """Cumulative buckets."""

    def __init__(self, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """The histogram in Prometheus' text format."""
        yield f"# TYPE {name} histogram"
        running = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {running}"


class Latencies:
    """What finished requests took and how they ended."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens, self.end_to_end = Histogram(), Histogram(), Histogram()
        self.queued = Histogram()
        self.prompt, self.output = Histogram(_TOKENS), Histogram(_TOKENS)
        self.finished = {"stop": 0, "length": 0, "abort": 0}

    def observe(self, request: Request) -> None:
        """Count one finished request."""
        self.finished[request.finish] += 1
        sampled = len(request.logprobs)
        self.queued.add((request.admitted or request.ended) - request.arrived)
        if request.first_token:
            self.first_token.add(request.first_token - request.arrived)
        if sampled > 1:
            self.between_tokens.add((request.ended - request.first_token) / (sampled - 1))
        self.end_to_end.add(request.ended - request.arrived)
        self.prompt.add(len(request.prompt))
        self.output.add(sampled)

    def lines(self) -> Iterator[str]:
        """All of it, under both families of names."""
        both = {
            "time_to_first_token_seconds": self.first_token,
            "e2e_request_latency_seconds": self.end_to_end,
        }
        for name, histogram in both.items():
            for family in ("sglang", "vllm"):
                yield from histogram.lines(f"{family}:{name}")
        # the mean over a request's tokens, one observation a request
        yield from self.between_tokens.lines("sglang:inter_token_latency_seconds")
        yield from self.between_tokens.lines("vllm:request_time_per_output_token_seconds")
        yield from self.queued.lines("sglang:queue_time_seconds")
        yield from self.queued.lines("vllm:request_queue_time_seconds")
        yield from self.prompt.lines("vllm:request_prompt_tokens")
        yield from self.output.lines("vllm:request_generation_tokens")
        yield "# TYPE vllm:request_success_total counter"
        for reason, count in self.finished.items():
            yield f'vllm:request_success_total{{finished_reason="{reason}"}} {count}'


def prometheus(s: Scheduler, latencies: Latencies, busy_s: float) -> str:
    """All metrics as text."""
    running, waiting = len(s.running), len(s.waiting)
    used = sum(request.computed for request in list(s.running.values()))
    capacity = s.core.cache.slots * s.max_len
    c = s.counters
    gauges = {
        "sglang:num_running_reqs": running,
        "sglang:num_queue_reqs": waiting,
        "sglang:num_paused_reqs": running if s.paused else 0,
        "sglang:num_retracted_reqs": sum(request.retractions > 0 for request in list(s.waiting)),
        "sglang:num_used_tokens": used,
        "sglang:max_total_num_tokens": capacity,
        "sglang:token_usage": used / capacity,
        "sglang:cache_hit_rate": c.cached_tokens / c.prompt_tokens if c.prompt_tokens else 0.0,
        "sglang:gen_throughput": c.generated_tokens / busy_s if busy_s else 0.0,
        "vllm:num_requests_running": running,
        "vllm:num_requests_waiting": waiting,
        "vllm:kv_cache_usage_perc": used / capacity,
        "fullarc:paused": int(s.paused),
        "fullarc:prefix_cache_tokens": len(s.prefix),
        "fullarc:prefix_spilled_tokens": s.prefix.on_disk,
        "fullarc:prefix_spill_stopped": int(bool(s.prefix.spill and s.prefix.spill.stopped)),
        "sglang:spec_accept_length": c.spec.accept_length,
        "sglang:spec_accept_rate": c.spec.accept_rate,
    }
    counters = {
        "sglang:prompt_tokens_total": c.prompt_tokens,
        "sglang:generation_tokens_total": c.generated_tokens,
        "sglang:cached_tokens_total": c.cached_tokens,
        "sglang:num_requests_total": c.requests,
        "sglang:num_aborted_requests_total": c.aborted,
        "sglang:num_retracted_reqs_total": c.retracted + c.preempted,
        "vllm:prompt_tokens_total": c.prompt_tokens,
        "vllm:generation_tokens_total": c.generated_tokens,
        "vllm:prefix_cache_queries_total": c.prompt_tokens,
        "vllm:prefix_cache_hits_total": c.cached_tokens,
        "vllm:num_preemptions_total": c.retracted + c.preempted,
        "vllm:spec_decode_num_drafts_total": c.spec.verified,
        "vllm:spec_decode_num_draft_tokens_total": c.spec.proposed,
        "vllm:spec_decode_num_accepted_tokens_total": c.spec.accepted,
        "fullarc:weight_updates_total": c.weight_updates,
        "fullarc:prefix_blocks_spilled_total": s.prefix.spilled,
        "fullarc:prefix_blocks_returned_total": s.prefix.returned,
        "fullarc:engine_steps_total": c.steps,
        "fullarc:engine_busy_seconds_total": busy_s,
    }
    lines: list[str] = []
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for name, value in values.items():
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines.append(f"# TYPE {name} counter")
    hits = enumerate(c.spec.per_position(MAX_DRAFTS))
    lines += [f'{name}{{position="{place}"}} {count}' for place, count in hits]
    config = f'block_size="1",num_gpu_blocks="{capacity}",kv_cache_size_tokens="{capacity}"'
    lines += ["# TYPE vllm:num_requests_waiting_by_reason gauge", "# TYPE vllm:cache_config_info gauge"]
    lines += [f'vllm:num_requests_waiting_by_reason{{reason="capacity"}} {waiting}']
    lines += [f"vllm:cache_config_info{{{config}}} 1"]
    return "\n".join([*lines, *latencies.lines()]) + "\n"
