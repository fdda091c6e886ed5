#!/usr/bin/env bash
# job.sh SBATCH-ARGS...: submit from the login machine, poll each 0.2 s (sbatch --wait polls at 2 to 10 s), print the end state, return the
# job's exit code (128 + signal where one ended it).
set -euo pipefail
run="$(cd "$(dirname "$0")" && pwd)/slurm-net.sh run"
job=$($run sbatch --parsable "$@")
while :; do
  # On a busy machine scontrol may give up for once: only an answer counts.
  line=$($run scontrol -o show job "$job" 2>/dev/null) || { sleep 1; continue; }
  case $line in
    *JobState=PENDING* | *JobState=RUNNING* | *JobState=COMPLETING* | *JobState=CONFIGURING* | *JobState=SUSPENDED*) sleep 0.2 ;;
    *) break ;;
  esac
done
grep -oE '(JobId|JobState|Reason|ExitCode|RunTime|Restarts)=[^ ]*' <<<"$line" | tr '\n' ' '; echo
code=$(grep -o ' ExitCode=[0-9:]*' <<<"$line" | cut -d= -f2)
[ "${code#*:}" = 0 ] && exit "${code%:*}"
exit $((128 + ${code#*:}))
