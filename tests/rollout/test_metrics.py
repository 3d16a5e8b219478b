"""vLLM's figures as text. That they are there, and stand still when the engine does, test_faults.py shows."""

from __future__ import annotations

from megatron_rlsc.rollout.metrics import Metrics, read_metrics

TEXT = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="policy"} 3.0
vllm:num_requests_running{engine="1",model_name="policy"} 2.0
vllm:num_requests_waiting{engine="0",model_name="policy"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="policy",reason="capacity"} 9.0
vllm:prompt_tokens_total{engine="0",model_name="policy"} 1.2e+07
vllm:prompt_tokens_cached_total{engine="0",model_name="policy"} 5.0
vllm:generation_tokens_total{engine="0",model_name="policy"} 17.0
vllm:generation_tokens_created{engine="0",model_name="policy"} 1.7e+09
"""


def test_figures_are_summed_over_engines_and_others_left_out() -> None:
    assert read_metrics(TEXT) == Metrics(prompt_tokens=12_000_000, generation_tokens=17, unfinished=6)


def test_figures_that_are_not_there_are_not_made_up() -> None:
    assert read_metrics("") == Metrics(prompt_tokens=0, generation_tokens=0, unfinished=None)
