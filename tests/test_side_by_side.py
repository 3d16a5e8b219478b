"""benchmarks/side_by_side.py: its sides agree where p_old does not underflow, and what it measures is what there is.

Not covered: seconds; a GPU; TRL, but where RLSC_TRL_PYTHON names its environment (benchmarks/sides/trl_env.sh).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from sides.compare import Entry, Step, agree  # noqa: E402
from sides.growth import slope  # noqa: E402
from sides.measure import Cost, gradient_bytes, measure  # noqa: E402
from sides.processes import Variant, Worker  # noqa: E402
from sides.work import Outcome, Setup, Shape, draw, response_tokens, samples_of, write_model  # noqa: E402

TRL = os.environ.get("RLSC_TRL_PYTHON")
SHAPE = Shape(vocab_size=16, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
SIZES = [(3, [1, 4, 2, 1]), (5, [3, 1, 2, 5])]
"""Prompt and responses of two groups: of 16 tokens, p_old of so few is 1e-8 and more."""
ALPHA, TEMPERATURE, LR = 0.1, 0.5, 1e-3
MIB = 2**20


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("model")
    write_model(SHAPE, folder, scale=4)
    return Setup(model=folder, lr=LR, temperature=TEMPERATURE, alpha=ALPHA)


@pytest.fixture(scope="module")
def reference(setup: Setup) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """One response at a time in float64, and its weights after AdamW's first update, by its formula."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(setup.model, dtype=torch.float64)
    samples = samples_of(SIZES, SHAPE.vocab_size, seed=1)
    log_p = []
    for sample in samples:
        tokens = torch.tensor([sample.prompt_token_ids + sample.response_token_ids])
        logits = model(tokens).logits[0, len(sample.prompt_token_ids) - 1 : -1]
        targets = torch.tensor(sample.response_token_ids)
        log_p.append((logits / TEMPERATURE).log_softmax(-1)[range(len(targets)), targets].sum())
    found = torch.stack(log_p)
    p_old = found.detach().exp()
    assert (p_old > 0.01 * ALPHA).sum() > 3, "p_old matters"
    loss = -((p_old + ALPHA) * found).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert norm > 1, "clipping matters"
    weights = {}
    for name, parameter in model.named_parameters():
        decayed = parameter.detach() * (1 - LR * (0.01 if parameter.dim() > 1 else 0))
        clipped = gradients[name] / norm
        weights[name] = decayed - LR * clipped / (clipped.abs() + 1e-8)  # both moments, bias corrected
    logprobs = sorted(found.tolist())
    return Outcome(loss=loss.item(), gradient_norm=norm, logprobs=logprobs), weights


@pytest.mark.parametrize(
    ("module", "micro_batch"),
    [("ours", 0), ("hf", 4), ("plain_megatron", 4), ("trl_grpo", 4)],
)
def test_a_side_is_the_algorithm(
    module: str, micro_batch: int, setup: Setup, reference: tuple[Outcome, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    if module == "trl_grpo" and TRL is None:
        pytest.skip("RLSC_TRL_PYTHON names no environment with TRL: bash benchmarks/sides/trl_env.sh FOLDER makes one")
    python = Path(TRL) if module == "trl_grpo" and TRL else Path(sys.executable)
    with Worker(Variant(name=module, module=module, python=python), setup) as worker:
        outcome, cost = worker.step(
            samples_of(SIZES, SHAPE.vocab_size, seed=1), micro_batch, save=tmp_path / "weights.pt"
        )
    expected, weights = reference
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-5)
    assert outcome.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert outcome.logprobs == pytest.approx(expected.logprobs, rel=1e-5, abs=1e-5)
    assert cost.seconds > 0 and cost.cpu > 0 and cost.peak > 0
    updated = torch.load(tmp_path / "weights.pt")
    updated.pop("lm_head.weight", None)  # of tied models some list it too
    assert updated.keys() == weights.keys()
    for name, weight in updated.items():
        if "k_proj.bias" in name:
            continue  # a key's bias has no gradient but its rounding, which Adam makes a step of
        change = torch.full_like(weights[name], LR).norm()
        assert (weight.double() - weights[name]).norm() < 1e-2 * change, name


def test_settings_reach_our_side(setup: Setup) -> None:
    """Packs of 8 tokens: a sample of 10 does not fit."""
    variant = Variant(name="ours", module="ours", settings={"train": {"max_tokens_per_micro_batch": 8}})
    with Worker(variant, setup) as worker, pytest.raises(RuntimeError, match="10 tokens does not fit a micro-batch"):
        worker.step(samples_of(SIZES, SHAPE.vocab_size, seed=1), 0)


def test_the_peak_is_what_a_call_takes() -> None:
    def take() -> float:
        kept = torch.ones(64 * MIB // 4)
        gone = torch.ones(128 * MIB // 4)
        total = gone.sum().item()
        del gone
        return total + kept[0].item()

    for _ in range(2):  # nothing is left of the first
        total, cost = measure(take, [], "cpu")
        assert total == 128 * MIB / 4 + 1
        assert cost.peak == pytest.approx(192 * MIB, rel=0.05)


def test_gradients_count_whoever_keeps_them() -> None:
    parameter = torch.nn.Parameter(torch.ones(32 * MIB // 4))

    def make() -> None:
        parameter.grad = None
        parameter.sum().mul(2).backward()

    _, anew = measure(make, [parameter], "cpu")
    assert anew.peak == pytest.approx(32 * MIB, rel=0.1)
    assert parameter.grad is not None
    parameter.main_grad = parameter.grad.view(-1)  # type: ignore[attr-defined]
    assert gradient_bytes([parameter]) == 32 * MIB
    _, kept = measure(lambda: parameter.grad.add_(1), [parameter], "cpu")
    assert kept.peak == pytest.approx(32 * MIB, rel=0.1)


def test_slopes() -> None:
    assert slope([3, 6, 12, 24, 48]) == pytest.approx(1)
    assert slope([1, 4, 16, 64, 256]) == pytest.approx(2)
    assert slope([5] * 5) == pytest.approx(0)


def test_sides_that_differ_are_refused() -> None:
    def step(name: str, gradient_norm: float) -> Step:
        outcome = Outcome(loss=2.0, gradient_norm=gradient_norm, logprobs=[])
        return Step(
            entry=Entry(name=name, micro_batch=1), tokens=1, outcome=outcome, cost=Cost(seconds=1, cpu=1, peak=1)
        )

    assert agree([step("a", 1.0), step("b", 1.000004)]) == pytest.approx(4e-6)
    with pytest.raises(ValueError, match=r"gradient_norm of .*'b'.* is 1.0001, that of .*'a'.* 1.0: 1.0e-04 apart"):
        agree([step("a", 1.0), step("b", 1.0001)])
    with pytest.raises(ValueError, match="nan apart"):
        agree([step("a", 1.0), step("b", float("nan"))])


def test_draws() -> None:
    """Lengths of one seed are the same for every vocabulary; siblings have their prompt in common."""
    small, large = (draw("long-tailed", seed=3, vocabulary=size, groups=2) for size in (100, 1000))
    assert [sample.length for sample in small] == [sample.length for sample in large]
    assert len({sample.prompt_token_ids for sample in small}) == 2 and len(small) == 32
    uniform = draw("uniform", seed=0, vocabulary=100)
    assert len({len(sample.response_token_ids) for sample in uniform}) == 1
    lengths = sorted(len(sample.response_token_ids) for sample in small)
    assert lengths[-1] > 3 * lengths[len(lengths) // 2] and response_tokens(small) == sum(lengths)
