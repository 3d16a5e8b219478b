#!/usr/bin/env bash
# Records five steps of the tiny model with a real sampler into journal/, and replays them on one rank into golden.jsonl.
#   bash tests/golden/regenerate.sh TRAINER_PYTHON SIDECAR_PYTHON
# The journal changes only when the base model or the journal's format does; golden.jsonl also when the numerics do.
set -euo pipefail
cd "$(dirname "$0")/../.."
trainer=$1 sidecar=$2
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
flags=$(cat tests/golden/flags.txt)

"$trainer" -m megatron_rlsc $flags --output-dir "$run/recorded" --sidecar-python "$sidecar"
"$trainer" -m megatron_rlsc $flags --output-dir "$run/replayed" --replay-rollouts "$run/recorded/rollouts"
rm -rf tests/golden/journal
cp -r "$run/recorded/rollouts" tests/golden/journal
"$trainer" - "$run/replayed/metrics.jsonl" >tests/golden/golden.jsonl <<'PYTHON'
import json
import sys

for line in open(sys.argv[1]):
    row = json.loads(line)
    print(json.dumps({tag: row[tag] for tag in ("step", "loss", "confidence/log_mean", "optimizer/gradient_norm")}))
PYTHON
