# shellcheck shell=bash
# The exact commands of a run, each as an array in `command`: what --dry-run prints is what runs.

# plan_replicas: how many servers a sidecar node holds, or the trainer's first node, and the GPUs of each.
plan_replicas() {
    local free=$GPUS_PER_NODE
    ((SIDECAR_NODES)) || [[ -n $evaluates ]] || free=$((GPUS_PER_NODE - TRAINER_PROCESSES_PER_NODE))
    replicas=$((GPUS_PER_NODE == 0 ? 1 : free / sidecar_tensor_parallel))
    num_servers=$((SIDECAR_NODES * replicas))
    [[ -z $replays ]] || num_servers=0
    [[ -z $evaluates ]] || ((TRAINER_NODES == 1 && SIDECAR_NODES == 0)) ||
        fail 2 "an evaluation takes one node: TRAINER_NODES=1 SIDECAR_NODES=0"
    [[ -n $replays ]] || ((replicas)) || fail 2 "no GPU is left for vLLM: $free of $GPUS_PER_NODE on its node, and \
sidecar_tensor_parallel_size $sidecar_tensor_parallel; give it SIDECAR_NODES, or TRAINER_PROCESSES_PER_NODE fewer"
}

# place JOB_ID RESTARTS NODE...: who is where. Ports follow from the job, so that two on one node do not meet; those of
# another life too, and below the range that the kernel takes its own from.
place() {
    local offset=$((($1 * 37 + $2 * 7) % 1000))
    shift 2
    trainer_nodes=("${@:1:TRAINER_NODES}")
    sidecar_nodes=("${@:TRAINER_NODES+1:SIDECAR_NODES}")
    master_port=$((15000 + offset * 2)) first_port=$((17000 + offset * 8))
    launcher=$run_dir/launcher key_file=$run_dir/launcher/key
}

# Of one server: SERVER is its place among all, from 0.
server_node() { echo "${sidecar_nodes[$1 / replicas]}"; }
server_port() { echo $((first_port + $1 % replicas)); }
server_name() {
    local name
    name=sidecar-$(server_node "$1")
    ((replicas == 1)) && echo "$name" || echo "$name-$(($1 % replicas))"
}

comma() { # WORD...: with commas between
    local IFS=,
    echo "$*"
}

# begin_step NAME PROCESSES_A_NODE NODE...: the beginning of `command`; nothing where there is no Slurm.
begin_step() {
    local name=$1 processes=$2
    shift 2
    command=()
    [[ -z $alone ]] || return 0
    command=(srun --job-name="$name" --nodes=$# --ntasks=$(($# * processes)) --ntasks-per-node="$processes"
        --nodelist="$(comma "$@")" --cpus-per-task=$(((cpus_per_node + processes - 1) / processes)) --cpu-bind=none)
    ((GPUS_PER_NODE == 0)) || command+=(--gpus-per-node="$GPUS_PER_NODE")
    command+=(--kill-on-bad-exit=1 --input=none --label --open-mode=append --output="$launcher/$name.log"
        "${SRUN_FLAGS[@]}")
}

# trainer_flags: `trainer`, what every rank is told, and the preflight before it.
trainer_flags() {
    local server first=$TRAINER_PROCESSES_PER_NODE devices=() urls=()
    trainer=("${recipe[@]}" --load "$megatron_dir" --sidecar-python "$SIDECAR_PYTHON")
    [[ -z $resume ]] || trainer+=("$resume")
    [[ -z $replays ]] || return 0
    if ((SIDECAR_NODES)); then
        for ((server = 0; server < num_servers; server++)); do
            urls+=("http://$(server_node "$server"):$(server_port "$server")")
        done
        trainer+=(--rollout-urls "${urls[@]}" --rollout-key-file "$key_file")
    elif ((GPUS_PER_NODE)); then
        mapfile -t devices < <(seq "$first" $((first + replicas * sidecar_tensor_parallel - 1)))
        trainer+=(--sidecar-replicas "$replicas" --sidecar-devices "${devices[@]}")
    fi
}

convert_command() {
    begin_step convert 1 "${trainer_nodes[0]}"
    command+=("${WRAP[@]}" "$TRAINER_PYTHON" tools/convert_hf.py to-megatron --keep --hf-dir "$hf_dir"
        --megatron-dir "$megatron_dir")
}

# ranks_command NAME PORT PYTHON_ARGUMENT...: one process a rank, on all trainer nodes.
ranks_command() {
    local name=$1 port=$2
    shift 2
    trainer_flags
    begin_step "$name" "$TRAINER_PROCESSES_PER_NODE" "${trainer_nodes[@]}"
    command+=("${WRAP[@]}" env "${TRAINER_ENV[@]}")
    if [[ -z $alone ]]; then
        command+=(MASTER_ADDR="${trainer_nodes[0]}" MASTER_PORT="$port" bash tools/launch/rank.sh "$TRAINER_PYTHON")
    else
        command+=("$TRAINER_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$TRAINER_PROCESSES_PER_NODE"
            --shutdown-timeout $((grace_seconds + 30)))
    fi
    command+=("$@" "${trainer[@]}")
}
preflight_command() { ranks_command preflight $((master_port + 1)) tools/preflight.py; }
trainer_command() { ranks_command trainer "$master_port" -m megatron_rlsc; }

server_command() { # SERVER
    local replica=$(($1 % replicas)) gpus=() environment=("${SIDECAR_ENV[@]}")
    begin_step "$(server_name "$1")" 1 "$(server_node "$1")"
    # Servers of one node share it: steps wait for each other otherwise.
    command+=(--overlap)
    if ((GPUS_PER_NODE)); then
        mapfile -t gpus < <(seq $((replica * sidecar_tensor_parallel)) $(((replica + 1) * sidecar_tensor_parallel - 1)))
        environment+=("CUDA_VISIBLE_DEVICES=$(comma "${gpus[@]}")")
    fi
    ((${#environment[@]} == 0)) || environment=(env "${environment[@]}")
    command+=("${WRAP[@]}" "${environment[@]}" bash tools/launch/serve.sh "$SIDECAR_PYTHON" "$key_file"
        --model "$hf_dir" --host 0.0.0.0 --port "$(server_port "$1")" --dtype "$dtype" --seed "$seed"
        --max-model-len "$max_model_len" --max-num-seqs "$max_num_seqs"
        --tensor-parallel-size "$sidecar_tensor_parallel" --gpu-memory-utilization "$gpu_memory_utilization"
        "${SIDECAR_FLAGS[@]}")
}

# On the login node, before there is a checkpoint and a server.
plan_command() {
    command=("${here[@]}" tools/plan_memory.py "${recipe[@]}" --load "$hf_dir"
        --trainer-gpus $((TRAINER_NODES * TRAINER_PROCESSES_PER_NODE)) --gpu-memory-gib "$GPU_MEMORY_GIB")
}
login_command() {
    command=(env WORLD_SIZE=$((TRAINER_NODES * TRAINER_PROCESSES_PER_NODE)) "${here[@]}" tools/preflight.py
        "${recipe[@]}" --load "$hf_dir" --sidecar-python "$SIDECAR_PYTHON")
}

# work_command: the job's own step.
work_command() {
    [[ -n $evaluates ]] || { trainer_command; return; }
    begin_step evaluation 1 "${trainer_nodes[0]}"
    command+=("${WRAP[@]}" env "${TRAINER_ENV[@]}")
    [[ -n $alone ]] || command+=(bash tools/launch/rank.sh)
    command+=("$TRAINER_PYTHON" tools/evaluate.py --model "$MODEL" --output "$run_dir" "${recipe[@]}")
    servers_of_a_node
    command+=("${EVALUATE[@]}")
    [[ $resume != --overwrite ]] || command+=(--overwrite)
}

# evaluate_command: of the trained model; the servers of the run are gone by then.
evaluate_command() {
    command=("${WRAP[@]}" "$TRAINER_PYTHON" tools/evaluate.py --model "$run_dir/hf" "${recipe[@]}")
    servers_of_a_node
    command+=(--protocol recipe --data "$EVAL_DATA" --output "$run_dir/evaluation/rlsc")
}

# servers_of_a_node: what an evaluation starts itself, as many as there are GPUs for.
servers_of_a_node() {
    local gpus servers=$((GPUS_PER_NODE / sidecar_tensor_parallel))
    command+=(--sidecar-python "$SIDECAR_PYTHON")
    ((GPUS_PER_NODE)) || return 0
    mapfile -t gpus < <(seq 0 $((servers * sidecar_tensor_parallel - 1)))
    command+=(--sidecar-replicas "$servers" --sidecar-devices "${gpus[@]}")
}

# show: `command` as a shell would take it, on lines that fit a screen.
show() {
    local word line='   ' indent='    '
    for word in "${command[@]}"; do
        # %q would write \, for the comma of a list, which needs no quoting.
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=$(printf '%q' "$word")
        if ((${#line} + ${#word} > 112)); then
            printf '%s \\\n' "$line"
            line="    $indent"
        fi
        line+=" $word"
    done
    printf '%s\n' "$line"
}

# describe: what --dry-run prints. Nodes are named node1, node2, ...; ports are those of job 0.
describe() {
    local nodes server node=1 ranks=$TRAINER_PROCESSES_PER_NODE
    mapfile -t nodes < <(seq -f node%g $((TRAINER_NODES + SIDECAR_NODES)))
    cpus_per_node=${SLURM_CPUS_ON_NODE:-128}
    place 0 0 "${nodes[@]}"
    echo "$(summary). Nodes are named node1, node2, ... here; ports follow from the job's id, here 0; a node has" \
        "$cpus_per_node CPUs."
    if [[ -n $evaluates ]]; then
        printf '\nnode1: evaluation\n'
        work_command && show
        alone=yes
        printf '\nwithout Slurm, on a machine with %s GPUs\n' "$GPUS_PER_NODE"
        work_command && show
        return
    fi
    if [[ -n $converts ]]; then
        printf '\nnode1: the HF model as a Megatron checkpoint, where it is not there yet\n'
        convert_command && show
    fi
    if [[ $PREFLIGHT == yes ]]; then
        printf '\n%s: preflight\n' "$(comma "${trainer_nodes[@]}")"
        preflight_command && show
    fi
    for ((server = 0; server < num_servers; server++)); do
        printf '\n%s: vLLM, replica %s of %s\n' "$(server_node "$server")" $((server + 1)) "$num_servers"
        server_command "$server" && show
    done
    for node in "${!trainer_nodes[@]}"; do
        ((node)) || echo
        printf '%s: ranks %s to %s\n' "${trainer_nodes[$node]}" $((node * ranks)) $(((node + 1) * ranks - 1))
    done
    trainer_command && show
    if ((${#nodes[@]} == 1)); then
        printf '\nwithout Slurm, on a machine with %s GPUs\n' "$GPUS_PER_NODE"
        alone=yes
        trainer_command && show
    fi
    printf '\nafterwards\n'
    evaluate_command && show
}

summary() {
    [[ -z $evaluates ]] || { echo "evaluation of $MODEL into $run_dir: $replicas x TP $sidecar_tensor_parallel"; return; }
    local where="vLLM on $SIDECAR_NODES more: $num_servers x TP $sidecar_tensor_parallel"
    ((SIDECAR_NODES)) || where="vLLM beside rank 0: $replicas x TP $sidecar_tensor_parallel"
    [[ -z $replays ]] || where="no vLLM: a journal is replayed"
    echo "$RECIPE into $run_dir: $TRAINER_NODES trainer node(s) of $TRAINER_PROCESSES_PER_NODE ranks, $where"
}
