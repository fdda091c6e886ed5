#!/usr/bin/env bash
# Pretrain over the nodes of a Slurm job:   sbatch -N 16 slurm/pretrain.sh CONFIG [section.key=value ...]
# A site edits the #SBATCH lines below and nothing else; slurm/README.md explains the variables PLACE_*.
#SBATCH --job-name=place
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=place-%j.log
# The batch shell is told 300 s before the time limit: a checkpoint, then the job queues itself again.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# A lost node does not end the job: PLACE restarts from its newest checkpoint.
#SBATCH --no-kill
set -uo pipefail
# A worker that loses its driver or its host aborts: no core file of its memory in the folder of submission.
ulimit -S -c "${PLACE_CORE_LIMIT:-0}"

say() { echo "pretrain.sh: $*"; }
fail() { say "$@" >&2; exit "$code"; }

code=2
[ $# -ge 1 ] || fail "no config given; usage: sbatch -N NODES slurm/pretrain.sh CONFIG [section.key=value ...]"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script; start it with sbatch"
config=$1; shift
[ -r "$config" ] || fail "config $config cannot be read from $PWD; give a path that the nodes see"

# ---- where PLACE is: the script that was submitted stands in a checkout on shared disk
job=$(scontrol -o show job "$SLURM_JOB_ID")
field() { grep -o " $1=[^ ]*" <<<"$job" | cut -d= -f2; }
submitted=$(field Command)
limit=$(field TimeLimit)
if [[ $limit == 00:0?:?? ]]; then
  say "the time limit is $limit, and --signal=B:USR1@300 tells the job to end 300 s before it: at once or soon after each" \
    "start it saves a checkpoint and queues itself again; submit with --time=30 or more, or with --signal=B:USR1@60"
fi
root=${PLACE_ROOT:-$(cd "$(dirname "$submitted")/.." && pwd)}
[ -r "$root/slurm/ray_node.sh" ] || fail "$root is no checkout of PLACE (no slurm/ray_node.sh); set PLACE_ROOT"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# ---- the environment: modules, a virtual environment, or a container
if [ -n "${PLACE_MODULES:-}" ]; then
  # shellcheck disable=SC2086  # a list of words
  module load $PLACE_MODULES || fail "module load $PLACE_MODULES failed"
fi
venv=${PLACE_VENV:-$root/.venv}
if [ -z "${PLACE_CONTAINER:-}" ] && [ -r "$venv/bin/activate" ]; then
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
elif [ -n "${PLACE_VENV:-}" ] && [ -z "${PLACE_CONTAINER:-}" ]; then
  fail "PLACE_VENV=$PLACE_VENV has no bin/activate"
fi
prefix=()
if [ -n "${PLACE_CONTAINER:-}" ]; then
  [ -r "$PLACE_CONTAINER" ] || fail "PLACE_CONTAINER=$PLACE_CONTAINER cannot be read"
  # shellcheck disable=SC2206  # a list of words
  prefix=(apptainer exec --nv ${PLACE_CONTAINER_ARGS:-} "$PLACE_CONTAINER")
fi

# ---- this job's own address, ports, folder and token
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${SLURMD_NODENAME:-${nodes[0]}}
find_address() {
  if [ -n "${PLACE_INTERFACE:-}" ]; then
    ip -o -4 addr show dev "$PLACE_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}'
  else
    { getent ahostsv4 "$head" | awk '{print $1}'; hostname -I | tr ' ' '\n'; } | grep -v '^127\.' | head -n 1
  fi
}
PLACE_HEAD=$(find_address)
[ -n "$PLACE_HEAD" ] || fail "no address of $head found; set PLACE_INTERFACE to the name of its network interface"
PLACE_PORT=$((${PLACE_FIRST_PORT:-20000} + SLURM_JOB_ID % 600 * 20))
# Short: sockets live below it, and their names end at 107 characters.
PLACE_TMP=${PLACE_TMP_ROOT:-/tmp}/place-$SLURM_JOB_ID
install -d -m 700 "$PLACE_TMP" || fail "$PLACE_TMP cannot be made; set PLACE_TMP_ROOT to a folder of the node's own"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export PLACE_HEAD PLACE_PORT PLACE_TMP RAY_AUTH_MODE RAY_AUTH_TOKEN
# A silent host is given up after about 10 s; Ray's default is a minute.
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-5000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-1000}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-2000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-4}
# The nodes are ours: Ray would run its workers at the lowest priority.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
# Nothing is served from these nodes that would have to drain first.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
# Without its head a node ends, so that the job can start anew.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-30}
export RAY_ADDRESS=$PLACE_HEAD:$PLACE_PORT TMPDIR=$PLACE_TMP OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The driver notes here that a new start of the job would help.
export PLACE_REQUEUE_NOTE=$PLACE_TMP/requeue

step() { # step NODE ROLE: Ray on one node, as a job step of its own; takes the place of its subshell
  exec srun --quiet --overlap --nodes=1 --ntasks=1 --nodelist="$1" --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" \
    --no-kill --kill-on-bad-exit=0 --wait=0 --input=none ${prefix[@]+"${prefix[@]}"} \
    bash "$root/slurm/ray_node.sh" "$2"
}
is_open() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
is_taken_out() { # true only where Slurm answers so
  local now
  now=$(squeue -h -j "$SLURM_JOB_ID" -o %N 2>/dev/null)
  [ -n "$now" ] && ! scontrol show hostnames "$now" | grep -qx "$1"
}
keep_worker() { # starts the node's Ray again when it ended: a cable is plugged in again, a host comes back
  local silent srun was_up
  until [ -e "$PLACE_TMP/stopping" ]; do
    step "$1" worker & srun=$!
    silent=0 was_up=
    while kill -0 "$srun" 2>/dev/null; do
      sleep 1
      if is_open "$1" $((PLACE_PORT + 7)); then was_up=1 silent=0
      elif [ -n "$was_up" ]; then silent=$((silent + 1)); fi
      # srun does not hear of a host that lost its power and booted again.
      if [ "$silent" -ge 15 ]; then kill -KILL "$srun"; break; fi
    done
    wait "$srun" 2>/dev/null
    if [ -e "$PLACE_TMP/stopping" ]; then return; fi
    if is_taken_out "$1"; then say "Slurm took $1 out of the job"; return; fi
    [ -n "$was_up" ] || sleep 5
  done
}
stop_ray() { # SIGTERM to the steps alone, which clean up; those that hang are killed
  [ ${#steps[@]} -gt 0 ] || return 0
  touch "$PLACE_TMP/stopping"
  scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null
  ( sleep "${PLACE_STOP_S:-20}"; scancel --signal=KILL "$SLURM_JOB_ID" ) 2>/dev/null & local killer=$!
  wait "${steps[@]}" 2>/dev/null
  kill "$killer" 2>/dev/null
  steps=()
  rm -f "$PLACE_TMP/stopping"
}
wait_for() { # wait PID to its end: a trapped signal interrupts `wait`
  while :; do
    wait "$1"; local status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}
# shellcheck disable=SC2317  # called by traps
pass_on() { # the driver saves a checkpoint at its next step and ends with 85
  say "got $1"
  ending=$1
  [ -n "$driver" ] || return
  kill -"$1" "$driver" 2>/dev/null
  # With SIGTERM Slurm ends every step as well, and soon the rest: leave nothing by then.
  if [ "$1" = TERM ]; then
    touch "$PLACE_TMP/stopping"
    ( sleep 4; kill -KILL "$driver"; sleep 3; rm -rf "$PLACE_TMP"; sleep 1; rm -rf "$PLACE_TMP" ) 2>/dev/null &
  fi
}

steps=(); driver=; ending=
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap 'stop_ray; rm -rf "$PLACE_TMP"' EXIT

gpus=${SLURM_GPUS_ON_NODE:-0}
workers=$((${#nodes[@]} * (gpus > 0 ? gpus : 1)))
for try in $(seq "${PLACE_MAX_HEAD_RESTARTS:-3}"); do
  say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, try $try: ${#nodes[@]} nodes, $gpus GPUs a node, head $head at $RAY_ADDRESS"
  step "$head" head & head_step=$!
  steps=("$head_step")
  for node in "${nodes[@]}"; do
    if [ "$node" != "$head" ]; then keep_worker "$node" & steps+=($!); fi
  done
  until is_open "$PLACE_HEAD" "$PLACE_PORT" || ! kill -0 "$head_step" 2>/dev/null; do sleep 0.3; done
  ${prefix[@]+"${prefix[@]}"} python3 -m place pretrain --config "$config" cluster.num_workers="$workers" "$@" &
  driver=$!
  # When the head's Ray ends first, the driver has nothing to talk to.
  ( while kill -0 "$head_step" 2>/dev/null; do sleep 1; done
    sleep 5; kill -KILL "$driver" 2>/dev/null ) & guard=$!
  wait_for "$driver"; code=$?
  kill -0 "$head_step" 2>/dev/null && head_lives=1 || head_lives=
  kill "$guard" 2>/dev/null
  driver=
  stop_ray
  if [ -z "$head_lives" ] && [ "$code" -ge 128 ] && [ -z "$ending" ]; then
    say "Ray's head on $head ended before the run did; starting both again from the newest checkpoint"
    continue
  fi
  break
done

if [ "$code" -eq 85 ] && [ -s "$PLACE_REQUEUE_NOTE" ]; then
  say "requeueing: $(cat "$PLACE_REQUEUE_NOTE")"
  rm -rf "$PLACE_TMP"
  scontrol requeue "$SLURM_JOB_ID" || say "scontrol requeue failed; submit the same command again to go on"
elif [ "$code" -ge 128 ] && [ -z "$ending" ]; then
  say "the driver was killed (exit $code); submit the same command again to go on from the newest checkpoint" >&2
fi
exit "$code"
