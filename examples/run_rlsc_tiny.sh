#!/usr/bin/env bash
# RLSC from end to end on two CPU cores: HF model in, training at TP=2 beside a live vLLM, HF model out, what was gained.
#
#     bash examples/run_rlsc_tiny.sh [--trainer-python P] [--sidecar-python P] [flags of `python -m megatron_rlsc`]
#
# Makes the two environments that are not given. Any other flag goes to the trainer, over examples/rlsc_tiny.toml:
#     --pipeline-model-parallel-size 2      two pipeline stages instead of two tensor-parallel ranks
#     --tensor-model-parallel-size 1        two data-parallel replicas
#     --seed 5 --output-dir runs/seed-5     --overwrite     --resume
# Another model, and other questions; without --eval-data they are measured on too, and need an `answer` for that:
#     --load HF_DIR   --data-path QUESTIONS.jsonl --prompt-template qwen25-math-cot --apply-chat-template
#     --eval-data PROBLEMS.jsonl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=checkpoints/rlsc-tiny-base
problems=examples/data/addition_heldout.jsonl
output=runs/rlsc-tiny
trainer='' sidecar='' eval_data='' layout=(--tensor-model-parallel-size 2) flags=()

while (($#)); do
    # `--flag=value` as `--flag value`
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case ${1//_/-} in
        --trainer-python) trainer=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --sidecar-python) sidecar=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --load) base=${2:?"$1 needs a path"} && shift 2 && continue ;;
        --eval-data) problems=${2:?"$1 needs a path"} eval_data=given && shift 2 && continue ;;
        --data-path) [[ -n $eval_data ]] || problems=${2:?"$1 needs a path"} ;;
        --output-dir) output=${2:?"$1 needs a path"} ;;
        --tensor-model-parallel-size | --pipeline-model-parallel-size) layout=() ;;
    esac
    flags+=("$1")
    shift
done

if [[ -z $trainer ]]; then bash tools/setup_env.sh --trainer && trainer=$PWD/.venv/bin/python; fi
if [[ -z $sidecar ]]; then bash tools/setup_env.sh --sidecar && sidecar=$PWD/.venv-sidecar/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
# Two ranks and vLLM share the cores: each rank with one thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

megatron=checkpoints/$(basename "$base")-megatron
"$trainer" tools/convert_hf.py to-megatron --hf-dir "$base" --megatron-dir "$megatron" --overwrite

"$trainer" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_rlsc --config examples/rlsc_tiny.toml \
    --load "$megatron" --sidecar-python "$sidecar" "${layout[@]}" "${flags[@]}"

evaluate() { # HF_DIR NAME: a fresh process that knows no trainer; greedy, and sampled as in training
    "$trainer" tools/evaluate.py --model "$1" --config "$output/config.toml" --protocol recipe --data "$problems" \
        --temperature 0 "$temperature" --output "$output/evaluation/$2" --overwrite
}
temperature=$(sed -n 's/^temperature = //p' "$output/config.toml")
evaluate "$base" base
evaluate "$output/hf" rlsc
"$trainer" tools/summarize_run.py --base "$output/evaluation/base" --rlsc "$output/evaluation/rlsc" \
    --metrics "$output/metrics.jsonl" --output "$output/summary.json"
"$trainer" tools/report.py "$output" || true # says what it lacks: an environment of one's own may have no plots
