"""verify and inspect: two folders that are one model, and every way in which they may not be.

The Megatron side's log-probabilities are held against megatron-core's in tests/policy/test_converted.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny
from safetensors.torch import save_file
from test_convert import to_megatron
from transformers import AutoModelForCausalLM

from megatron_rlsc.conversion.overview import look_at
from megatron_rlsc.conversion.verify import check_manifests, compare_logprobs, compare_tensors, open_pair, report

TEXTS = [torch.tensor([1, 2, 3, 49, 0, 7]), torch.tensor([5, 5]), torch.arange(40)]


def verify(hf_dir: Path, megatron_dir: Path) -> tuple[bool, str]:
    pair = open_pair(hf_dir, megatron_dir)
    differences = compare_tensors(pair, workers=2, progress=lambda count: None)
    return report(pair, differences, *compare_logprobs(pair, TEXTS, lambda count: None))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_conversion_is_the_same_model(tiny, tmp_path, dtype):
    same, lines = verify(tiny.hf_dir, to_megatron(tiny.hf_dir, tmp_path / "m", dtype))
    assert same, lines
    count = len(tiny.state)
    assert f"{count} of {count} equal, bit for bit" in lines and lines.endswith("\nthe same model")
    assert ("after the cast to bfloat16" in lines) == (dtype is not None)


def test_log_probabilities_are_transformers_s(tiny, tmp_path):
    pair = open_pair(tiny.hf_dir, to_megatron(tiny.hf_dir, tmp_path / "m"))
    layers, results = compare_logprobs(pair, TEXTS, lambda count: None)
    model = AutoModelForCausalLM.from_pretrained(tiny.hf_dir)
    for text, result in zip(TEXTS, results):
        with torch.no_grad():
            logprobs = model(text[None]).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, text[1:, None]).sum().item()
        assert result.hf == pytest.approx(expected, abs=1e-3)
        assert result.megatron == pytest.approx(expected, abs=1e-3)
    assert len(layers) == 2 and max(layer.worst for layer in layers) < 1e-4


def test_yarn_is_computed(untied, tmp_path):
    """By transformers on one side and by a few lines of ours on the other; and it is not the plain rotation."""
    plain = compare_logprobs(open_pair(untied.hf_dir, to_megatron(untied.hf_dir, tmp_path / "plain")), TEXTS, print)[1]
    config = json.loads((untied.hf_dir / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 16}
    (untied.hf_dir / "config.json").write_text(json.dumps({**config, "rope_parameters": yarn}))
    pair = open_pair(untied.hf_dir, to_megatron(untied.hf_dir, tmp_path / "m"))
    stretched = compare_logprobs(pair, TEXTS, lambda count: None)[1]
    assert max(result.worst for result in stretched) < 1e-3
    assert abs(stretched[2].hf - plain[2].hf) > 0.1


def test_one_changed_number_is_found(untied, tmp_path):
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    untied.state["model.layers.1.self_attn.v_proj.weight"][3, 4] += 1
    save_file(untied.state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    same, lines = verify(untied.hf_dir, megatron)
    assert not same
    assert "26 of 27 equal" in lines and "model.layers.1.self_attn.v_proj.weight: 1 of 256 numbers differ" in lines
    assert "NOT the same model" in lines and "it begins in layer 1" in lines


def test_a_table_that_is_wrong_both_ways_is_found(untied, tmp_path, monkeypatch):
    """gate and up exchanged, on the way there and in the comparison: equal tensors, other log-probabilities."""
    from megatron_rlsc.conversion import plan

    true = plan.segments

    def exchanged(rule, shape):
        found = true(rule, shape)
        if rule.layout != "gate_up":
            return found
        rows = found[0].rows
        return [type(s)(hf=s.hf, hf_row=s.hf_row, row=(s.row + rows) % (2 * rows), rows=rows) for s in found]

    monkeypatch.setattr(plan, "segments", exchanged)
    same, lines = verify(untied.hf_dir, to_megatron(untied.hf_dir, tmp_path / "m"))
    assert not same and "27 of 27 equal" in lines and "it begins in layer 0" in lines


def test_what_is_not_finite_is_a_difference(untied, tmp_path, monkeypatch):
    from megatron_rlsc.conversion import blocks

    untied.state["model.norm.weight"][5] = float("nan")
    save_file(untied.state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "is_finite", lambda tensor: True)
        megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    (difference,) = compare_tensors(open_pair(untied.hf_dir, megatron), workers=1, progress=lambda count: None)
    assert difference.name == "model.norm.weight" and "NaN" in difference.reason


def test_configs_that_differ_are_named(untied, tmp_path):
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    config = json.loads((megatron / "hf/config.json").read_text())
    (megatron / "hf/config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"config\.json of .* differ in rms_norm_eps"):
        open_pair(untied.hf_dir, megatron)


def test_damage_since_the_conversion_is_found_by_checksum(untied, tmp_path):
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    assert check_manifests(open_pair(untied.hf_dir, megatron)) == 5
    archive = megatron / "release/__0_0.distcp"
    data = bytearray(archive.read_bytes())
    data[-1] ^= 1  # in the archive's own directory, where no number is
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=r"__0_0\.distcp has changed"):
        check_manifests(open_pair(untied.hf_dir, megatron))


def test_an_overview_of_either_format(tmp_path):
    tiny = save_tiny(tmp_path / "tiny", tied=True)
    megatron = to_megatron(tiny.hf_dir, tmp_path / "m", torch.bfloat16)
    hf, converted = (look_at(folder) for folder in (tiny.hf_dir, megatron))
    assert (
        hf.shape == converted.shape and dict(hf.dtypes) == {"float32": 26} and dict(converted.dtypes) == {"bfloat16": 9}
    )
    assert hf.nbytes == 2 * converted.nbytes and not hf.has_manifest and len(converted.manifest) == 5
    text = "\n".join(converted.lines())
    assert "converted" in text and "tied to the embedding" in text and "5 files" in text
    with pytest.raises(ValueError, match="there is no folder"):
        look_at(tmp_path / "absent")
    (tmp_path / ".absent.partial").mkdir()
    with pytest.raises(ValueError, match="interrupted conversion"):
        look_at(tmp_path / "absent")
