"""vLLM's OpenAI server as a rollout sidecar: `python -m megatron_rlsc.rollout.serve --model DIR [vLLM's own flags]`.

Runs in the sidecar's environment, with the key in RLSC_ROLLOUT_KEY. Adds what must always hold to vLLM's flags, and
nothing else: the model folder needs only config.json, since the first push brings the weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack

from megatron_rlsc.rollout.auth import required_key
from megatron_rlsc.rollout.keeper import follow_keeper
from megatron_rlsc.rollout.wire import PUSH_DIR_VARIABLE, SERVED_MODEL_NAME, TRANSFER_BACKEND, memory_backed_root

DEFAULTS = ["--host", "127.0.0.1"]
"""Before the caller's flags, which override them."""

ALWAYS = [
    *("--served-model-name", SERVED_MODEL_NAME),
    *("--load-format", "dummy"),
    # Token ids go in and come out: a folder may have a tokenizer that vLLM does not know (tokenizer.model alone).
    "--skip-tokenizer-init",
    # A model folder's own top-k, top-p and penalties would bend the distribution that responses are drawn from.
    *("--generation-config", "vllm"),
    # log_softmax(logits / temperature), the distribution sampled from; vLLM's default leaves the temperature out.
    *("--logprobs-mode", "processed_logprobs"),
    # Opens /inference/v1/generate, the one endpoint that tells which weights made each token.
    "--enable-scale-out",
    *("--middleware", "megatron_rlsc.rollout.auth.RequireKey"),
    *("--worker-extension-cls", "megatron_rlsc.rollout.engine.Inspection"),
    *("--weight-transfer-config", json.dumps({"backend": TRANSFER_BACKEND})),
    "--disable-uvicorn-access-log",
]
"""After the caller's flags, which they override."""

ON_CPU = [
    "--enforce-eager",
    # A prompt split over two passes rewinds the generator of its seed; CPU generators cannot, and the engine dies.
    "--no-enable-chunked-prefill",
]
"""Likewise, on CPUs."""


def main(argv: list[str]) -> None:
    """Serves until SIGTERM. Raises ValueError without a key."""
    follow_keeper()
    required_key()
    # vLLM reads these when it is imported; dev mode opens the weight-transfer routes, which the middleware guards.
    os.environ.update(VLLM_SERVER_DEV_MODE="1", VLLM_NO_USAGE_STATS="1")
    with ExitStack() as stack:
        if PUSH_DIR_VARIABLE not in os.environ:
            own = tempfile.TemporaryDirectory(prefix="rlsc-push-", dir=memory_backed_root())
            os.environ[PUSH_DIR_VARIABLE] = stack.enter_context(own)
        _serve(argv)


def _serve(argv: list[str]) -> None:
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    args = _parse([*DEFAULTS, *argv, *ALWAYS, *(ON_CPU if on_cpu else [])])
    if on_cpu:
        _settle_on_cpu(args.tensor_parallel_size)

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    uvloop.run(run_server(args))


def _parse(argv: list[str]) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser(prog="megatron_rlsc.rollout.serve")).parse_args(argv)
    validate_parsed_serve_args(args)
    return args


def _settle_on_cpu(tensor_parallel_size: int) -> None:
    """What vLLM's engine processes, which start from this environment, need on a CPU."""
    # vLLM compiles its samplers even in eager mode: 19 s before the first token instead of 2.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Without a size vLLM claims nearly all of the machine's memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if tensor_parallel_size > 1:
        # One worker a group of cores; vLLM's `auto` looks for a NUMA node a worker.
        cores = sorted(os.sched_getaffinity(0))
        groups = [cores[rank::tensor_parallel_size] for rank in range(tensor_parallel_size)]
        if not all(groups):
            raise ValueError(f"tensor parallel size {tensor_parallel_size} on {len(cores)} cores: one core a worker")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, group)) for group in groups))


if __name__ == "__main__":
    main(sys.argv[1:])
