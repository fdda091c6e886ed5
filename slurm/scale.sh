#!/usr/bin/env bash
# Submit one run at several node counts:   slurm/scale.sh "1 2 4 8" CONFIG [section.key=value ...]
# Every rung has the config's global batch (strong scaling) and a run folder of its own, RUN/nodes_N, so that the curves can be
# laid over each other. What stands in PLACE_SBATCH goes to sbatch, such as PLACE_SBATCH="--account=x --time=2:00:00".
set -euo pipefail
if [ $# -lt 2 ]; then
  echo 'scale.sh: usage: slurm/scale.sh "1 2 4 8" CONFIG [section.key=value ...]' >&2
  exit 2
fi
counts=$1 config=$2
shift 2
run=${PLACE_SCALE_DIR:-runs/scale-$(basename "$config" .yaml)}
here=$(cd "$(dirname "$0")" && pwd)
for count in $counts; do
  case $count in
    '' | *[!0-9]* | 0) echo "scale.sh: '$count' is no number of nodes" >&2; exit 2 ;;
  esac
done
for count in $counts; do
  # shellcheck disable=SC2086  # a list of words
  job=$(sbatch --parsable -N "$count" --job-name="place-$count" ${PLACE_SBATCH:-} \
    "$here/pretrain.sh" "$config" "$@" run.dir="$run/nodes_$count")
  echo "$count nodes: job $job, run folder $run/nodes_$count"
done
