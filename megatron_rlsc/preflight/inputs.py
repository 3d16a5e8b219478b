"""What the trainer reads and where it writes: layout, memory, model, prompts, output folder; by its own functions."""

from __future__ import annotations

import math
import os

import torch

from megatron_rlsc.conversion.folders import is_megatron_checkpoint
from megatron_rlsc.conversion.manifest import check_sizes
from megatron_rlsc.conversion.overview import look_at
from megatron_rlsc.data import PromptSource, read_questions
from megatron_rlsc.disk import free_bytes, readable
from megatron_rlsc.memory import GIB
from megatron_rlsc.planning import check_layout, check_token_budget, require_fits
from megatron_rlsc.policy.kernels import choose_kernels, inspect_machine
from megatron_rlsc.preflight.finding import Finding, differing, ok, still_open, warning
from megatron_rlsc.preflight.site import Site
from megatron_rlsc.run_folder.checkpoints import candidates
from megatron_rlsc.run_folder.folder import check_run_dir
from megatron_rlsc.run_folder.names import CHECKPOINTS
from megatron_rlsc.sampler import build_sampler
from megatron_rlsc.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from megatron_rlsc.tracking import require_figure


def check_sizes_of_layout(at: Site) -> Finding:
    """TP, PP, CP and VPP fit the model and the number of ranks: WORLD_SIZE, also where it is all that is set."""
    layout = at.config.parallel
    grid = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    planned = os.environ.get("WORLD_SIZE", "")
    world_size = int(planned) if planned.isdigit() else grid
    dp = check_layout(at.shape, layout, world_size=world_size)
    sizes = f"TP {layout.tensor_model_parallel_size} x PP {layout.pipeline_model_parallel_size}" + (
        f" x CP {layout.context_parallel_size}" if layout.context_parallel_size > 1 else ""
    )
    if not planned:
        return ok(f"{sizes} fits the model, on any multiple of {grid} ranks (WORLD_SIZE=N checks a number)")
    return ok(f"{sizes} x DP {dp} on {world_size} ranks")


def check_memory(at: Site) -> Finding:
    """What the layout needs of the smallest GPU, by the plan that the launcher has printed."""
    mine, shared = 0, _shared_with_vllm(at)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(at.ranks.local_rank).total_memory
        # The plan counts in whole GPUs: what a driver keeps of one is in its allowance.
        mine = math.ceil(total / GIB) * GIB
        if shared:
            mine = int(mine * (1 - at.config.rollout.sidecar_gpu_memory_utilization))
    smallest = min(at.ranks.exchange("memory", mine, seconds=60))
    if not smallest:
        return still_open("no GPUs: a host's memory is not planned")
    spec = choose_kernels(at.config.model, at.config.optimizer, inspect_machine()).spec
    try:
        stages = require_fits(at.shape, at.config, world_size=at.ranks.size, spec=spec, gpu_bytes=smallest)
    except ValueError as error:
        raise ValueError(f"{error}{shared}") from None
    return ok(
        f"{max(stage.total for stage in stages) / GIB:.1f} of {smallest / GIB:.1f} GiB on the fullest GPU{shared}"
    )


def _shared_with_vllm(at: Site) -> str:
    """Words where this rank's GPU is one that the trainer's vLLM takes its share of, too."""
    rollout, ranks = at.config.rollout, at.ranks
    if rollout.rollout_urls or rollout.replay_rollouts is not None or ranks.hosts[ranks.rank] != ranks.hosts[0]:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [int(name) if name.isdigit() else place for place, name in enumerate(visible) if name]
    device = names[ranks.local_rank] if ranks.local_rank < len(names) else ranks.local_rank
    if rollout.sidecar_devices and device not in rollout.sidecar_devices:
        return ""
    return (
        f"; vLLM takes {rollout.sidecar_gpu_memory_utilization:.0%} of GPU {device}: --sidecar-devices gives it "
        f"others, --sidecar-gpu-memory-utilization less"
    )


def check_model(at: Site) -> Finding:
    """Every rank can read the model, whole and the same. Weights are not read: their files' headers and sizes are."""
    trouble, mine = "", ""
    try:
        model = look_at(at.config.model.load)
        mine = f"{model.kind}, {at.shape.num_parameters / 1e9:.2f} G parameters, {readable(model.nbytes)}"
    except (ValueError, OSError) as error:
        trouble = str(error)
    everybody = at.ranks.exchange("model", mine, seconds=60)
    if trouble:
        raise ValueError(trouble)
    if at.ranks.rank == 0 and all(everybody) and (others := differing(everybody, at.ranks.hosts)):
        raise ValueError(f"--load {at.config.model.load} is not one model on all nodes: {others}")
    return ok(mine)


def check_resumed(at: Site) -> Finding:
    """The checkpoint that `--resume` goes on from, by its files' sizes; and the figure by which the best is kept."""
    train, folder = at.config.train, at.config.train.output_dir / CHECKPOINTS
    require_figure(train.keep_best)
    if not train.resume or not is_megatron_checkpoint(folder):
        return ok("begins anew" if train.resume else "not asked for")
    damaged: list[str] = []
    for path in candidates(folder, warn=damaged.append):
        try:
            check_sizes(path)
        except ValueError as error:
            damaged.append(str(error))
        else:
            goes_on = f"goes on from {path}"
            return warning("\n".join([goes_on, *damaged])) if damaged else ok(goes_on)
    raise ValueError("\n".join([f"no checkpoint of {folder} is sound:", *damaged]))


def check_prompts(at: Site) -> Finding:
    """Questions, templates and tokenizer; the longest prompt with its response fits context and micro-batch."""
    rollout = at.config.rollout
    if rollout.replay_rollouts is not None:
        build_sampler(at.config, at.model_dir, at.shape)
        return ok(f"none: replays {rollout.replay_rollouts}")
    tokenizer = load_tokenizer(at.model_dir)
    check_vocabulary(
        tokenizer, stop_token_ids(tokenizer, at.model_dir), vocab_size=at.shape.vocab_size, folder=at.model_dir
    )
    prompts = PromptSource(
        at.config.data,
        tokenizer,
        seed=at.config.train.seed,
        max_prompt_tokens=at.shape.max_position_embeddings - rollout.max_response_length,
    )
    longest = prompts.longest_prompt + rollout.max_response_length
    budget = at.config.train.max_tokens_per_micro_batch
    check_token_budget(longest, at.config.parallel, max_tokens=budget)
    count, path = len(read_questions(at.config.data.data_path)), at.config.data.data_path
    return ok(f"{count} in {path}; the longest and a response are {longest} tokens, of {budget} a micro-batch")


def check_output(at: Site) -> Finding:
    """The run's folder: that it is this run's to write, under the settings that it was made with, and has room."""
    folder, config = at.config.train.output_dir, at.config
    check_run_dir(folder, config, at.model_dir, at.shape)
    return ok(f"{folder.absolute()}, {readable(free_bytes(folder))} free")


def check_sampler(at: Site) -> Finding:
    """All else that the trainer's first rank asks for when it starts, by the function that it does it with: vLLM's
    ports, the servers' key, shared memory for a push, the journal that is replayed."""
    build_sampler(at.config, at.model_dir, at.shape)
    rollout = at.config.rollout
    if rollout.replay_rollouts is not None:
        return ok(f"replays {rollout.replay_rollouts}")
    if rollout.rollout_urls:
        return ok(f"{len(rollout.rollout_urls)} servers of --rollout-urls, and their key")
    last = rollout.sidecar_port + rollout.sidecar_replicas - 1
    ports = (
        f"ports {rollout.sidecar_port} to {last} are free" if rollout.sidecar_port else "on ports that are free then"
    )
    return ok(f"{rollout.sidecar_replicas} vLLM on this node, {ports}; room in memory for a push")
