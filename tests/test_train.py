"""The whole loop: real vLLM, real megatron-core ranks under torchrun, real files, on the tiny base model.

Not covered: GPUs, several nodes, and that accuracy rises (examples/run_rlsc_tiny.sh shows that).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.sampler import Sampler
from megatron_rlsc.tokenizer import load_tokenizer, stop_token_ids
from megatron_rlsc.types import Sample

ROOT = Path(__file__).parents[1]
STEPS = 3
HELD_OUT = Path(__file__).with_name("held_out.jsonl")

TINY = (
    "--prompt-template={problem}=",
    "--no-apply-chat-template",
    "--prompts-per-step=4",
    "--samples-per-prompt=4",
    "--max-response-length=56",
    "--max-tokens-per-micro-batch=512",
    "--lr=3e-4",
    "--adam-eps=1e-5",  # with 1e-8 Adam magnifies the rounding of gradients that are 0 in exact arithmetic
    f"--train-iters={STEPS}",
)


def rlsc(
    *flags: object, ranks: int = 2, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m megatron_rlsc` on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = [*command, "-m", "megatron_rlsc", *TINY, *map(str, flags)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=env)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{a}+{1000 - a}"}) + "\n" for a in range(101, 131)))
    return path


@pytest.fixture(scope="session")
def run(
    base_model: Path,
    questions: Path,
    sidecar_python: Path,
    cluster_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Three steps at TP 2, without a home and behind dead proxies."""
    folder = tmp_path_factory.mktemp("runs") / "tp2"
    done = rlsc(
        f"--load={base_model}",
        f"--data-path={questions}",
        f"--sidecar-python={sidecar_python}",
        f"--output-dir={folder}",
        "--tensor-model-parallel-size=2",
        "--save-interval=2",
        "--eval-interval=1",
        f"--eval-data-path={HELD_OUT}",
        env=cluster_environment,
    )
    return Run(folder, done.stdout)


def test_one_line_and_one_row_a_step(run: Run) -> None:
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert sum(line.startswith("step ") for line in run.printed.splitlines()) == STEPS
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for tag in set(run.metrics[0]) - {"step"}:
        points = [(event.step, event.value) for event in board.Scalars(tag)]
        assert points == [(row["step"], pytest.approx(row[tag], rel=1e-6)) for row in run.metrics]


def test_held_out_problems_are_asked_of_each_steps_weights(run: Run, base_model: Path) -> None:
    """The same greedy responses as transformers has from the base, and at the end from the export."""
    rows = [json.loads(line) for line in (run.folder / "held_out.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [0, 1, 2, 3]
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for tag in rows[0]:
        points = [(event.step, event.value) for event in board.Scalars(tag)]
        assert points == [(step, pytest.approx(row[tag], rel=1e-6)) for step, row in enumerate(rows)]
    assert run.printed.count("held out, after step ") == 4
    problems = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    for folder, row in ((base_model, rows[0]), (run.folder / "hf", rows[3])):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
        right, lengths = 0, []
        for problem in problems:
            prompt = torch.tensor([tokenizer.encode(f"{problem['problem']}=")])
            options = {"do_sample": False, "eos_token_id": list(stop_token_ids(tokenizer, folder)), "pad_token_id": 0}
            (tokens,) = model.generate(prompt, max_new_tokens=56, **options)[:, prompt.shape[1] :].tolist()
            right += f"\\boxed{{{problem['answer']}}}" in tokenizer.decode(tokens, skip_special_tokens=True)
            lengths.append(len(tokens))
        assert row["held_out/accuracy"] == pytest.approx(100 * right / len(problems))
        assert row["held_out/response_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_prompts_that_are_shown(run: Run, base_model: Path) -> None:
    """What the export answers greedily stands as the last step's text; one of a step in between may have been late."""
    rows = [json.loads(line) for line in (run.folder / "shown.jsonl").read_text().splitlines()]
    assert {0, STEPS} <= {row["step"] for row in rows} <= {0, 1, 2, 3} and rows[-1]["step"] == STEPS
    assert len(rows[0]["answers"]) == 3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.folder / "hf").eval(), load_tokenizer(base_model)
    options = {"do_sample": False, "eos_token_id": list(stop_token_ids(tokenizer, base_model)), "pad_token_id": 0}
    answers = rows[-1]["answers"]
    assert [answer["prompt"] for answer in answers] == [f"{a}+{1000 - a}=" for a in (101, 102, 103)]
    for i, answer in enumerate(answers, start=1):
        prompt = torch.tensor([tokenizer.encode(answer["prompt"])])
        (tokens,) = model.generate(prompt, max_new_tokens=56, **options)[:, prompt.shape[1] :].tolist()
        assert answer["response"] == tokenizer.decode(tokens, skip_special_tokens=True)
        board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
        text = board.Tensors(f"shown/{i}/text_summary")[-1]
        assert text.step == STEPS and f"    {answer['response']}" in text.tensor_proto.string_val[0].decode()


def test_distributions_and_settings_are_on_the_board(run: Run) -> None:
    """Of 16 responses a step; log p of the trainer, and of each token that the sampler drew."""
    board = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    for tag in ("response_logprob", "token_logprob", "token_entropy"):
        assert [event.step for event in board.Histograms(f"distribution/{tag}")] == [1, 2, 3]
    for event, step in zip(board.Histograms("distribution/response_logprob"), (1, 2, 3)):
        logprobs = [sum(sample.rollout_logprobs) for sample in Journal(run.folder / "rollouts").read(step)]
        assert (event.histogram_value.num, event.histogram_value.sum) == (16, pytest.approx(sum(logprobs), abs=1e-2))
    assert {"custom_scalars__config__"} <= set(board.Tags()["tensors"])
    assert board.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


def test_a_report_of_a_real_run(run: Run, tmp_path: Path) -> None:
    tool, page = ROOT / "tools" / "report.py", tmp_path / "page.html"
    subprocess.run([sys.executable, tool, run.folder, "--output", page], check=True, timeout=300)
    text = page.read_text()
    assert "fixed prompts" in text and "held_out/accuracy" in text and "101+899=" in text


def test_nothing_is_looked_for_in_a_home(run: Run) -> None:
    """vLLM would say so in its log, on CPUs, and end on GPUs, where it keeps compiled kernels there."""
    assert "/proc/nonexistent" not in (run.folder / "sidecars" / "0.log").read_text()


def test_sampler_and_trainer_agree_on_every_step(run: Run) -> None:
    """fp32 on both sides: what is left is the order of sums."""
    assert all(row["rollout/logprob_difference"] < 1e-3 for row in run.metrics)
    assert [row["sync/pushes"] for row in run.metrics] == [2, 3, 4]


def test_every_sample_is_journaled_under_a_version_of_its_own_step(run: Run) -> None:
    versions = []
    for step in range(1, STEPS + 1):
        samples = Journal(run.folder / "rollouts").read(step)
        assert [(s.group, s.sample) for s in samples] == [(g, i) for g in range(4) for i in range(4)]
        versions.append({sample.version for sample in samples})
    assert [len(version) for version in versions] == [1] * STEPS
    assert len(set.union(*versions)) == STEPS


def test_the_export_is_the_trained_model(run: Run, base_model: Path) -> None:
    exported, base = (load_file(folder / "model.safetensors") for folder in (run.folder / "hf", base_model))
    assert exported.keys() == base.keys()
    moved = [name for name in base if not torch.equal(exported[name], base[name])]
    assert moved == list(base)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "hf")
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_the_resolved_config_makes_the_same_run(run: Run) -> None:
    config = tomllib.loads((run.folder / "config.toml").read_text())
    assert config["parallel"]["tensor_model_parallel_size"] == 2
    assert config["rollout"]["max_response_length"] == 56


def test_a_run_goes_on_from_its_checkpoint_on_another_layout(run: Run, base_model: Path, tmp_path: Path) -> None:
    """Step 3 again, from the checkpoint after step 2, at DP 2: the same weights. From the journal, since a sampler
    draws the same tokens only under the same batching."""
    folder = tmp_path / "resumed"
    folder.mkdir()
    for name in ("config.toml", "inputs.json", "metrics.jsonl"):
        (folder / name).write_bytes((run.folder / name).read_bytes())
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "iter_0000002").symlink_to(run.folder / "checkpoints" / "iter_0000002")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    done = rlsc(
        f"--load={base_model}",
        f"--replay-rollouts={run.folder / 'rollouts'}",
        f"--output-dir={folder}",
        *("--resume", "--allow-changed", "replay_rollouts"),
    )
    assert "resuming after step 2" in done.stdout
    assert [row["step"] for row in Run(folder, "").metrics] == [1, 2, 3]
    straight, resumed = (load_file(path / "hf" / "model.safetensors") for path in (run.folder, folder))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-4)


def test_conversion_there_and_back_needs_no_home(
    base_model: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    def convert(*words: object) -> None:
        command = [sys.executable, ROOT / "tools/convert_hf.py", *words]
        subprocess.run([*map(str, command)], check=True, env=cluster_environment, timeout=300)

    convert("to-megatron", "--hf-dir", base_model, "--megatron-dir", tmp_path / "megatron")
    convert("to-hf", "--megatron-dir", tmp_path / "megatron", "--hf-dir", tmp_path / "hf")
    there, back = (load_file(folder / "model.safetensors") for folder in (base_model, tmp_path / "hf"))
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)


def test_weights_that_are_not_finite_end_every_rank(base_model: Path, tmp_path: Path) -> None:
    """At PP 2 the second rank alone reads them; the first says so. A conversion of them leaves nothing."""
    broken, name = tmp_path / "broken", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(base_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[name][3, 5] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    told = f"1 of the {len(tensors)} tensors of {broken} hold NaN or infinity"

    journal, output = ROOT / "tests/golden/journal", tmp_path / "run"
    flags = (f"--load={broken}", f"--replay-rollouts={journal}", f"--output-dir={output}")
    done = rlsc(*flags, "--pipeline-model-parallel-size=2", check=False)
    assert done.returncode != 0
    assert f"rlsc: error: {told}" in done.stderr and f"them: {name}. Copy" in done.stderr
    assert not (output / "metrics.jsonl").exists()

    convert = [sys.executable, ROOT / "tools/convert_hf.py", "to-megatron", "--hf-dir", broken]
    done = subprocess.run([*convert, "--megatron-dir", tmp_path / "out"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "convert_hf: error: 1 of the" in done.stderr and f"them: {name}. Copy" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "run"}


PROBING = False
"""Whether the probe of each push is made, too."""


class ForgetfulSampler:
    """Leaves out the push after step 1, and says that it was made."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.pushes, self.version = sampler, 0, ""

    def push(self, weights: Iterable[tuple[str, Tensor]], step: int) -> str:
        self.pushes += 1
        if self.pushes != 2:
            self.version = self.sampler.push(weights, step)
        return self.version

    def probe(self, version: str) -> list[Sample] | None:
        return self.sampler.probe(version) if PROBING else []

    def sample(self, step: int, asked: int, version: str) -> list[Sample] | None:
        return self.sampler.sample(step, asked, version)

    def draw_anew(self, times: int) -> None:
        self.sampler.draw_anew(times)


LEFT_OUT = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
import megatron_rlsc.run as run
from test_train import ForgetfulSampler
whole = run.train
def forgetful(config, parts, stop, progress):
    return whole(config, replace(parts, sampler=ForgetfulSampler(parts.sampler)), stop, progress=progress)
run.train = forgetful
from megatron_rlsc.__main__ import main
main()
"""


def test_a_push_left_out_stops_the_run(base_model: Path, questions: Path, sidecar_python: Path, tmp_path: Path) -> None:
    """The sampler then has the weights of a step ago, under a version that nobody can tell from the right one: the
    comparison of log-probabilities is what sees it, before the second update."""
    code = LEFT_OUT.format(tests=str(Path(__file__).parent))
    flags = (
        f"--load={base_model}",
        f"--data-path={questions}",
        f"--sidecar-python={sidecar_python}",
        f"--output-dir={tmp_path / 'run'}",
    )
    done = subprocess.run([sys.executable, "-c", code, *TINY, *flags], capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert "step 2: the sampler's log-probability of a token differs" in done.stderr
    assert len(Run(tmp_path / "run", "").metrics) == 1
    assert Journal(tmp_path / "run" / "rollouts").read(2), "what was refused is kept for reading"
