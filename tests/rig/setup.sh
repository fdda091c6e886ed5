#!/bin/bash
# Bare Debian 12 -> everything slurm-net.sh needs: about 10 s, nothing where it is there.
set -e
# `command -v a b` is content with one of them.
for tool in slurmctld slurmd munged sbatch ip unshare; do command -v $tool >/dev/null || missing=1; done
[ -n "${missing:-}" ] || exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  slurmctld slurmd slurm-client munge iproute2 util-linux procps shellcheck
