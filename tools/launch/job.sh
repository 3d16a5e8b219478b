# shellcheck shell=bash
# One life of a job: its steps started and watched, signals turned into what the trainer understands, and the decision
# at the end. What the trainer says of itself, in RUN/status, is what counts: exit codes of srun say little.

background_pids=() work_pid='' out_of_time='' term_at=0 kill_at=0 # of this life

MARGIN_SECONDS=30 # before the time limit, beside what SIGTERM gives the trainer
BEAT_SECONDS=0.5  # between two looks at the steps, the signals and the clock
SAVE_SECONDS=10   # for ranks that save themselves after Slurm has ended their srun, as it does at scancel
END_SECONDS=20    # from SIGTERM to SIGKILL of servers
IDLE_LIVES=3      # so many in a row without a step, and the job does not go back to the queue

# run_job NODE...: from what is checked to what comes of it. `alone`: without Slurm, on this machine.
run_job() {
    place "${SLURM_JOB_ID:-0}" "${SLURM_RESTART_COUNT:-0}" "$@"
    open_launcher
    trap end_steps EXIT
    say "${SLURM_JOB_ID:+job $SLURM_JOB_ID, life $((${SLURM_RESTART_COUNT:-0} + 1)), }on $*: $(summary)"

    [[ -n $evaluates ]] || plan_memory || finish 2 "the layout does not fit"
    [[ -z $converts || -n $evaluates ]] || convert || finish 1 "no Megatron checkpoint of the model: $launcher/convert.log says why"
    if [[ $PREFLIGHT == yes ]]; then
        preflight_command
        stage preflight || finish 2 "the preflight failed: the end of $launcher/preflight.log says what to do"
    fi
    if [[ -z $usr1 && -z $term ]]; then
        [[ -n $evaluates ]] || start_servers
        start_work
        watch_steps
    fi
    end_steps
    conclude
}

# open_launcher: the folder of logs and key, and a clean start: a STOP of an earlier life is not meant for this one.
open_launcher() {
    mkdir -p "$launcher" || fail 2 "$launcher cannot be made"
    log=$launcher/launcher.log status_before=$(status_stamp) progress_before=$(progress)
    (umask 077 && head -c 32 /dev/urandom | base64 >"$key_file.new" && mv "$key_file.new" "$key_file") ||
        fail 1 "no key could be written to $key_file"
    rm -f "$run_dir/STOP"
    started=yes
    [[ -z $usr1 ]] || : >"$run_dir/STOP"
}

# say WORD...: without a process of its own, which a signal to all of the script's would end.
say() {
    local line
    printf -v line '%(%F %T)T %s' -1 "$*"
    echo "$line" >>"$log"
    echo "$line"
}

# finish CODE TEXT: the last line, and out.
finish() {
    [[ -z $term || $1 == 143 ]] || set -- 143 "ended by SIGTERM"
    say "$2 (exit code $1)"
    exit "$1"
}

status_stamp() { stat -c '%i %Y' "$run_dir/status" 2>/dev/null; }

# progress: changes with every step and every checkpoint, or with every response of an evaluation.
progress() {
    if [[ -n $evaluates ]]; then
        cat "$run_dir"/*/*/begun.jsonl 2>/dev/null | wc -l
    else
        echo "$(wc -l 2>/dev/null <"$run_dir/metrics.jsonl") $(cat "$run_dir"/checkpoints/latest*.txt 2>/dev/null)"
    fi
}

job_field() { scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }

# read_deadline: once SIGUSR1 says that the end is near, when the trainer gets SIGTERM, and when it is killed, for the
# script to have the last word. Preemption moves the end of a job.
read_deadline() {
    local end now
    now=$(date +%s)
    [[ -z $alone ]] || return 0
    end=$(date -d "$(job_field EndTime)" +%s 2>/dev/null) || return 0 # no time limit
    local lead=$((grace_seconds + MARGIN_SECONDS)) left=$((end - now))
    ((lead <= left / 2)) || lead=$((left / 2))
    term_at=$((end - lead)) kill_at=$((end - lead / 3))
}

# is_running PID: asked of the kernel. bash (5.2) may keep a job as running for ever that ends while it heeds a signal, and
# `wait -n` then waits for it; so nothing here asks `jobs`, or waits but for the clock.
is_running() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

# running: what of `background` is.
running() {
    local one
    for one in "${background_pids[@]}"; do is_running "$one" && echo "$one"; done
}

# background NAME: `command`, with its exit code in NAME.status when it has ended, also where a signal ends it that is
# sent to all processes of the script; its process is in `pid`.
background() {
    rm -f "$launcher/$1.status"
    {
        trap : TERM
        if [[ -z $alone ]]; then
            "${command[@]}"
        else
            "${command[@]}" > >(trap '' TERM && exec tee -a "$launcher/$1.log") 2>&1
        fi
        echo $? >"$launcher/$1.status"
    } &
    pid=$!
    background_pids+=("$pid")
}
code_of() { cat "$launcher/$1.status" 2>/dev/null || echo unknown; }

# stage NAME: `command` to its end, or to a signal that leaves no time for it. False with the end of its log where it
# fails; 143 after a signal.
stage() {
    local stage_pid
    say "$1: $launcher/$1.log"
    background "$1"
    stage_pid=$pid
    while is_running "$stage_pid"; do
        [[ -z $term ]] || return 143
        sleep 0.2
    done
    [[ $(code_of "$1") == 0 ]] && return 0
    [[ -n $alone ]] || tail -n 20 "$launcher/$1.log"
    return 1
}

plan_memory() {
    ((GPUS_PER_NODE)) || return 0
    plan_command
    "${command[@]}"
}

# convert: once; what is there already must be whole, and of this model.
convert() {
    convert_command
    stage convert
}

start_servers() {
    local server
    declare -gA server_pid=() server_restarts=()
    for ((server = 0; server < num_servers; server++)); do
        server_restarts[$server]=0
        start_server "$server"
    done
}

start_server() {
    local name
    name=$(server_name "$1")
    server_command "$1"
    background "$name"
    server_pid[$1]=$pid
    say "$name: vLLM on port $(server_port "$1"), $launcher/$name.log"
}

start_work() {
    work_command
    background "$work"
    work_pid=$pid
    say "$work: $((TRAINER_NODES * TRAINER_PROCESSES_PER_NODE)) ranks on ${trainer_nodes[*]}${resume:+, $resume}, \
$launcher/$work.log"
}

# watch_steps: until the trainer has ended. A server that ends is started again; the trainer takes it back by itself.
watch_steps() {
    local server
    while is_running "$work_pid"; do
        sleep "$BEAT_SECONDS"
        heed_signals
        heed_clock
        for server in "${!server_pid[@]}"; do
            is_running "$work_pid" || break
            [[ -z ${server_pid[$server]} ]] || is_running "${server_pid[$server]}" || server_ended "$server"
        done
    done
    heed_signals
    [[ -z $term || -n $alone ]] || await_status
    say "$work: ended with code $(code_of "$work"), its status is \`$(read_status)\`"
}

# await_status: the trainer's last word, where there is one.
await_status() {
    local end=$((SECONDS + SAVE_SECONDS))
    while [[ $(read_status) == running ]] && ((SECONDS < end)); do sleep 0.2; done
}

heed_signals() {
    if [[ -n $usr1 && -z ${told_usr1-} ]]; then
        told_usr1=yes
        say "SIGUSR1: the $work is asked to stop after its step ($run_dir/STOP)"
        read_deadline
    fi
    if [[ -n $term && -z ${told_term-} ]]; then
        told_term=yes
        stop_work TERM "as this script"
    fi
}

heed_clock() {
    local now
    now=$(date +%s)
    if ((term_at && now >= term_at)) && [[ -z ${told_term-} ]]; then
        told_term=yes out_of_time=yes
        stop_work TERM "little time is left"
    fi
    if ((kill_at && now >= kill_at)); then
        kill_at=0
        stop_work KILL "no time is left"
    fi
}

server_ended() {
    local name code
    name=$(server_name "$1") code=$(code_of "$name")
    server_pid[$1]=''
    if [[ -n $term ]]; then
        say "$name: ended with code $code"
        return
    fi
    if ((server_restarts[$1] >= SIDECAR_RESTARTS)); then
        say "$name: ended with code $code, and stays out (SIDECAR_RESTARTS=$SIDECAR_RESTARTS): the trainer goes on \
with the others, or ends by its own error"
        return
    fi
    ((server_restarts[$1]++))
    say "$name: ended with code $code, is started again (${server_restarts[$1]} of $SIDECAR_RESTARTS)"
    start_server "$1"
}

# stop_work SIGNAL WHY: through Slurm, since a signal to srun would kill the ranks.
stop_work() {
    say "$work: SIG$1, $2"
    signal_steps "$1" "$work" || say "$work: no such step is known to Slurm"
}

# signal_steps SIGNAL NAME_PATTERN: those that run; one that is being started may take a moment to be known.
signal_steps() {
    local id name try found=''
    # Of what runs alone, the children of the shells in `background`: torchrun passes the signal on.
    [[ -z $alone ]] || { pkill "-$1" -P "$(comma $(running))"; return; }
    for ((try = 0; try < 5; try++)); do
        [[ -n $(running) ]] || return 1
        while read -r id name; do
            # shellcheck disable=SC2053
            if [[ $name == $2 ]]; then
                found=yes
                # Some versions deliver SIGTERM, and say that they do not.
                scancel --signal="$1" "$id" </dev/null 2>/dev/null
            fi
        done < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j')
        [[ -z $found ]] || return 0
        sleep 1
    done
    return 1
}

# end_steps: nothing is left running, whatever it was.
end_steps() {
    local signal end
    trap '' USR1 TERM
    for signal in TERM KILL; do
        [[ -n $(running) ]] || return 0
        signal_steps $signal '@(convert|preflight|trainer|evaluation|sidecar-*)'
        end=$((SECONDS + END_SECONDS))
        while [[ -n $(running) ]] && ((SECONDS < end)); do sleep 0.5; done
    done
    # shellcheck disable=SC2046
    [[ -z $(running) ]] || { pkill -KILL -P "$(comma $(running))"; kill -KILL $(running) 2>/dev/null; }
}
