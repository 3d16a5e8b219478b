"""Measures a model on the paper's benchmarks, or on problems of one's own: accuracy with its interval, pass@k, length.

python tools/evaluate.py --model Qwen2.5-Math-7B --benchmarks aime24 math500 --output evaluation/base
python tools/evaluate.py --model runs/aime24/hf --benchmarks aime24 --data-dir data --output evaluation/rlsc
python tools/evaluate.py --url http://localhost:8000/v1 --benchmarks gsm8k --output evaluation/served
python tools/compare_evaluations.py evaluation/base evaluation/rlsc

Ended in any way, the same command goes on with the responses that are missing; a file STOP in OUTPUT, SIGUSR1 and
SIGTERM end it in order. Exit codes: 0 done or stopped, 143 SIGTERM, 2 a clear error. All other words are flags of
`python -m megatron_rlsc`, over --config RECIPE.toml: where vLLM is (--sidecar-python, --sidecar-replicas,
--rollout-urls, ...), --max-response-length, --seed, --bf16, and with `--protocol recipe` the prompt template.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from megatron_rlsc.config import Config, DataConfig
from megatron_rlsc.interrupt import STOP, TERMINATED, Interruption
from megatron_rlsc.lock import locked

BUSY = "--output {folder} belongs to an evaluation that is alive, {holder}: end that one first, or name another folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    model: Path | None = None
    """HF folder, or a Megatron checkpoint, whose newest step is converted; none with --url."""
    output: Path
    """Folder of what is measured: OUTPUT/BENCHMARK/greedy, or T0.6."""
    benchmarks: tuple[str, ...] = ()
    """By name: aime24, math500, amc23, gsm8k, minerva_math, olympiadbench, mmlu_stem, gpqa_diamond, or of your own."""
    data: tuple[Path, ...] = ()
    """Problems of your own: JSONL files whose lines have a `problem` or a `question`, and an `answer`."""
    data_dir: Path | None = None
    """Folder that has the benchmarks' files, as NAME.jsonl; without it they come from the Hugging Face hub."""
    benchmarks_file: Path | None = None
    """More benchmarks, as tables of TOML: see megatron_rlsc/evaluation/benchmarks.toml."""
    protocol: Literal["qwen25-math-cot", "evalchemy", "recipe"] = "qwen25-math-cot"
    """How the model is asked; `recipe` is the prompt template of training."""
    temperature: tuple[float, ...] = (0.0,)
    """Of the responses, 0 for greedy; several are measured one after the other."""
    samples: int | None = None
    """Responses to a problem at temperatures above 0, for avg@k, pass@k and maj@k. Default: the protocol's."""
    limit: int | None = None
    """The first so many problems of each benchmark."""
    overwrite: bool = False
    """Forget what OUTPUT has of these benchmarks."""
    url: str = ""
    """An OpenAI-compatible endpoint, up to and with /v1, that serves the model."""
    served_model: str = ""
    """What the model is called there, where several are served."""
    key_file: Path | None = None
    """File with the endpoint's key."""
    concurrency: int = 64
    """Requests to the endpoint under way."""
    graders: int | None = None
    """Processes that grade; by default one for each CPU, at most 16."""


def main() -> None:
    args, rest = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    from megatron_rlsc.recipe import parse_config

    try:
        config = parse_config(rest)
        with Interruption(args.output, grace_seconds=config.train.grace_seconds, watches_folder=True) as stop:
            finished = evaluate(args, config, stop)
        if stop.at_once and not finished:
            sys.exit(TERMINATED)
    except KeyboardInterrupt:
        sys.exit("evaluate: interrupted; the same command goes on")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        sys.exit(2)


def evaluate(args: Args, config: Config, stop: Interruption) -> bool:
    """Whether all is measured; False where `stop` has ended it before."""
    from megatron_rlsc.evaluation.benchmarks import Benchmark, read_benchmarks  # after --help
    from megatron_rlsc.evaluation.graders import Graders
    from megatron_rlsc.evaluation.measure import Asked, UnfinishedError, measure
    from megatron_rlsc.evaluation.problems import read_problems
    from megatron_rlsc.evaluation.report import line
    from megatron_rlsc.hub import load_rows
    from megatron_rlsc.run_folder.folder import write_status

    check(args)
    known = read_benchmarks(*[args.benchmarks_file] if args.benchmarks_file else [])
    if unknown := [name for name in args.benchmarks if name not in known]:
        raise ValueError(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [(known[name], known[name].load(args.data_dir, load_rows)) for name in args.benchmarks]
    chosen += [(Benchmark(name=path.stem, title=path.stem), read_problems(path)) for path in args.data]
    chosen = [(benchmark, problems[: args.limit]) for benchmark, problems in chosen]
    protocol = the_protocol(args, config.data)

    args.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(locked(args.output / "evaluate.lock", BUSY.replace("{folder}", str(args.output))))
        stop.last_words = partial(write_status, args.output)
        try:
            write_status(args.output, "running")
            everything = [Asked(problem=problem, sample=0) for _, problems in chosen for problem in problems]
            responder, model = open_responder(args, config, protocol, everything, stop, stack)
            stack.enter_context(responder)
            graders = stack.enter_context(Graders(args.graders))
            stop.begin()
            for benchmark, problems in chosen:
                if note := "" if args.limit else benchmark.difference(problems):
                    print(f"{benchmark.name}: {note}", file=sys.stderr)
                for temperature in args.temperature:
                    folder = args.output / benchmark.name / ("greedy" if temperature == 0 else f"T{temperature:g}")
                    if args.overwrite:
                        shutil.rmtree(folder, ignore_errors=True)
                    repeats = benchmark.repeats if protocol.repeats else 1
                    result = measure(
                        folder,
                        benchmark.name,
                        problems,
                        responder,
                        graders,
                        samples=repeats if temperature == 0 or args.samples is None else args.samples,
                        temperature=temperature,
                        last_line=protocol.last_line,
                        settings={
                            **model,
                            "protocol": protocol.name,
                            "template": protocol.template,
                            "apply_chat_template": protocol.apply_chat_template,
                            "max_response_length": config.rollout.max_response_length,
                            "seed": config.train.seed,
                        },
                    )
                    print(line(benchmark.title, result), flush=True)
        except UnfinishedError as unfinished:
            end = f"stopped after {unfinished}: {stop.reason()}"
            print(f"{end}; the same command goes on", flush=True)
            stop.settle(STOP)
            write_status(args.output, end)
            return False
        except (ValueError, RuntimeError, OSError) as error:
            write_status(args.output, f"failed: {str(error).splitlines()[0]}")
            raise
        write_status(args.output, f"done: {len(chosen)} sets of problems")
        return True


def check(args: Args) -> None:
    if not args.benchmarks and not args.data:
        raise ValueError("nothing to measure: --benchmarks names some, --data brings your own")
    if (args.model is None) == (not args.url):
        raise ValueError("the model is a folder (--model), or served at a --url: give one of the two")
    if min(args.temperature, default=-1.0) < 0:
        raise ValueError("--temperature must be 0, for greedy, or more")
    for name in ("samples", "limit", "graders", "concurrency"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    names = [*args.benchmarks, *(path.stem for path in args.data)]
    if len(set(names)) < len(names):
        raise ValueError(f"two of {', '.join(names)} have one name, and would have one folder")


def the_protocol(args: Args, data: DataConfig) -> Any:
    from megatron_rlsc.evaluation.protocols import PROTOCOLS, own_protocol

    name = args.protocol if args.protocol != "recipe" else data.prompt_template
    if name in PROTOCOLS:
        return replace(PROTOCOLS[name], apply_chat_template=data.apply_chat_template)
    template = "{problem}" if name == "plain" else name
    return own_protocol(template, apply_chat_template=data.apply_chat_template)


def open_responder(
    args: Args, config: Config, protocol: Any, everything: list[Any], stop: Interruption, stack: ExitStack
) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
    """Who answers, and what is said of the model in the results."""
    from megatron_rlsc.conversion.folders import is_megatron_checkpoint
    from megatron_rlsc.evaluation.endpoint import Endpoint, EndpointResponder
    from megatron_rlsc.responder import SidecarResponder

    limit, seed = config.rollout.max_response_length, config.train.seed
    if args.url:
        key = args.key_file.read_text().strip() if args.key_file else ""
        endpoint = Endpoint(url=args.url.rstrip("/"), model=args.served_model, key=key, concurrency=args.concurrency)
        responder = EndpointResponder(
            endpoint, protocol, max_response_length=limit, seed=seed, abandoned=lambda: bool(stop.urgency())
        )
        return responder, {"url": args.url, "served_model": args.served_model}
    assert args.model is not None
    hf_dir = args.model
    if is_megatron_checkpoint(args.model):
        from megatron_rlsc.conversion.convert import convert, plan_hf

        hf_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlsc-hf-"))) / "hf"
        convert(plan_hf(args.model, hf_dir, reference_dir=None, max_shard_size=5 * 10**9, overwrite=False))
    weights = sorted(hf_dir.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{args.model} is no HF model, nor a Megatron checkpoint: it has no *.safetensors")
    responder = SidecarResponder(
        hf_dir,
        config.rollout,
        protocol,
        bf16=config.model.bf16,
        seed=seed,
        logs=args.output / "vllm",
        problems=everything,
        abandoned=lambda: bool(stop.urgency()),
    )
    return responder, {"weights_sha256": {path.name: sha256(path) for path in weights}, "bf16": config.model.bf16}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
