"""vLLM's own figures, as far as we read them, and whether it stands still by them. No torch, no vllm."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

import httpx

from megatron_rlsc.rollout.load import Load
from megatron_rlsc.rollout.wire import bearer

POLL_TIMEOUT = 10.0
"""Seconds that one look at the figures may take; one that takes longer is no answer."""
_LINE = re.compile(
    r"^vllm:(prompt_tokens_total|generation_tokens_total|num_requests_running|num_requests_waiting)(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Summed over a server's engines. See vllm/v1/metrics/loggers.py."""

    prompt_tokens: int
    generation_tokens: int
    unfinished: int | None
    """Sequences, running and waiting; None where it does not say."""


def read_metrics(text: str) -> Metrics:
    """Of the text of `/metrics`. A counter that it does not have is 0."""
    sums: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    return Metrics(
        prompt_tokens=int(sums.get("prompt_tokens_total", 0)),
        generation_tokens=int(sums.get("generation_tokens_total", 0)),
        unfinished=int(sums["num_requests_running"] + sums.get("num_requests_waiting", 0))
        if "num_requests_running" in sums
        else None,
    )


async def watch(http: httpx.AsyncClient, load: Load, *, poll_seconds: float, stall_timeout: float) -> str:
    """Keeps `load` in step with what its replica does, and returns, with the reason, when the replica stands still.

    A stopped engine leaves /health at 200, and a server behind a broken network leaves requests waiting: what counts is
    that tokens come. A replica that has been asked for nothing is not looked at.
    """
    first = last = None
    moved = time.monotonic()
    while True:
        if load.prompts:
            metrics = await _poll(http, load, timeout=min(POLL_TIMEOUT, stall_timeout))
            now = time.monotonic()
            if metrics is not None:
                first = first or metrics
                if metrics.unfinished is not None:
                    load.polled(metrics.unfinished)
                load.generated = metrics.generation_tokens - first.generation_tokens
                tokens = metrics.prompt_tokens + metrics.generation_tokens
                if tokens != last:
                    last, moved = tokens, now
            if load.prompts and now - moved > stall_timeout:
                what = "has not answered GET /metrics" if metrics is None else "has generated nothing"
                return f"it {what} for {now - moved:.0f} s with {load.sequences} responses to go (--stall-timeout)"
        else:
            moved = time.monotonic()
        await asyncio.sleep(poll_seconds)


async def _poll(http: httpx.AsyncClient, load: Load, *, timeout: float) -> Metrics | None:
    url, key = f"{load.replica.url}/metrics", load.replica.key
    try:
        answer = await http.get(url, headers=bearer(key), timeout=timeout)
    except httpx.HTTPError:
        return None  # no answer; whoever waits for a response hears of a broken connection
    return read_metrics(answer.text) if answer.status_code == httpx.codes.OK else None
