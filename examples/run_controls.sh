#!/usr/bin/env bash
# The reviewers' questions, for one model: RLSC beside what it might be instead, each with the same questions, responses,
# steps and rate, on the same held-out problems; the base at temperature 0.1 and greedy beside them; one figure.
#
#     bash examples/run_controls.sh [controls] [ttrl] [alpha] [samples]     which sets of runs; without any, controls
#         [--trainer-python P] [--sidecar-python P] [--output-dir runs/controls] [flags of `python -m megatron_rlsc`]
#
#     controls    rlsc, self-sft, random, negative-entropy, ttrl, and with labels verified
#     ttrl        rlsc beside TTRL with 64 responses a question
#     alpha       rlsc with alpha 0, 0.01 and 1
#     samples     rlsc with 4, 8 and 32 responses a question
#
# `rlsc` is in every set: the recipe as it is, with alpha 0.1 and 16 responses a question unless flags say otherwise. A
# run that is done is not made again: the same command goes on after an interruption, and redraws. Of another model:
#     --load HF_DIR --data-path QUESTIONS.jsonl --prompt-template qwen25-math-cot --apply-chat-template
#     --eval-data PROBLEMS.jsonl --labels QUESTIONS_WITH_ANSWERS.jsonl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=checkpoints/rlsc-tiny-base
output=runs/controls
problems=examples/data/addition_heldout.jsonl
labels=examples/data/addition_labelled.jsonl
limit=200 samples=8
trainer=$PWD/.venv/bin/python sidecar=$PWD/.venv-sidecar/bin/python
sets=() flags=() layout=(--tensor-model-parallel-size 2)

while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case ${1//_/-} in
        controls | ttrl | alpha | samples) sets+=("$1") && shift && continue ;;
        --trainer-python) trainer=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --sidecar-python) sidecar=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --load) base=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --eval-data) problems=${2:?"$1 needs a path"} limit='' && shift 2 && continue ;;
        --labels) labels=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --output-dir) output=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --data-path) labels='' ;; # of other questions
        --tensor-model-parallel-size | --pipeline-model-parallel-size) layout=() ;;
    esac
    flags+=("$1")
    shift
done
((${#sets[@]})) || sets=(controls)

if [[ ! -x $trainer || ! -x $sidecar ]]; then bash tools/setup_env.sh; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$output"
held_out=$output/held_out.jsonl
if [[ -n $limit ]]; then head -n "$limit" "$problems" >"$held_out"; else cp "$problems" "$held_out"; fi

run() { # NAME FLAGS...: a run of its own, unless it is done
    local name=$1
    shift
    [[ -e $output/$name/hf/config.json ]] && return
    echo "== $name"
    "$trainer" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_rlsc \
        --config examples/rlsc_tiny.toml --load "$base" --sidecar-python "$sidecar" "${layout[@]}" "${flags[@]}" \
        --eval-interval 2 --eval-samples "$samples" --eval-data-path "$held_out" \
        --output-dir "$output/$name" --overwrite "$@"
}

compare() { # SET TITLE NAME...
    local set=$1 title=$2
    shift 2
    "$trainer" tools/compare_runs.py "${@/#/$output/}" --base "$output/base" --output "$output/$set" --title "$title"
}

a_run() { # NAME: of one of the sets
    case $1 in
        rlsc-alpha-*) run "$1" --alpha "${1##*-}" ;;
        rlsc-4 | rlsc-8 | rlsc-32) run "$1" --samples-per-prompt "${1##*-}" ;;
        ttrl-64) run "$1" --objective ttrl --samples-per-prompt 64 ;;
        verified) run "$1" --objective verified --data-path "$labels" ;;
        *) run "$1" --objective "$1" ;;
    esac
}

for set in "${sets[@]}"; do
    case $set in
        controls)
            title='RLSC and its controls' names=(rlsc self-sft random negative-entropy ttrl)
            [[ -z $labels ]] || names+=(verified)
            ;;
        ttrl) title='RLSC beside TTRL with 64 responses a question' names=(rlsc ttrl-64) ;;
        alpha) title='RLSC, and other values of alpha' names=(rlsc rlsc-alpha-0 rlsc-alpha-0.01 rlsc-alpha-1) ;;
        samples) title='RLSC, and other numbers of responses a question' names=(rlsc rlsc-4 rlsc-8 rlsc-32) ;;
    esac
    for name in "${names[@]}"; do a_run "$name"; done
    "$trainer" tools/evaluate.py --model "$base" --config "$output/${names[0]}/config.toml" --protocol recipe \
        --data "$held_out" --temperature 0 0.1 --samples "$samples" --output "$output/base"
    compare "$set" "$title" "${names[@]}"
done
