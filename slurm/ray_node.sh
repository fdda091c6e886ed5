#!/usr/bin/env bash
# Ray on one node of a job of pretrain.sh: ray_node.sh head|worker. Ends with SIGTERM, or with Ray, and leaves nothing.
set -uo pipefail
ulimit -S -c "${PLACE_CORE_LIMIT:-0}" # also where Slurm does not hand on the limits of the batch script
role=$1
install -d -m 700 "$PLACE_TMP"
ray=; asked=
# shellcheck disable=SC2317  # called by a trap
end_ray() {
  asked=1
  [ -n "$ray" ] && kill -TERM "$ray" 2>/dev/null
  for _ in $(seq 50); do kill -0 "$ray" 2>/dev/null || break; sleep 0.1; done
  kill -KILL "$ray" 2>/dev/null
}
clean() { # what killed workers left in shared memory is noted in this job's temporary folder
  python3 -m place.node clean "$PLACE_TMP"
  [ "$role" = head ] || rm -rf "$PLACE_TMP"
  rm -rf "$PLACE_TMP/ray"
}
clean_ended() { # jobs of ours that this node did not see the end of, because it lost its power
  local known left job
  known=$(squeue --noheader --me --format=%A 2>/dev/null) || return 0
  for left in "${PLACE_TMP%/*}"/place-*/; do
    job=${left%/}; job=${job##*/place-}
    [[ $job =~ ^[0-9]+$ && -O $left && " ${known//$'\n'/ } " != *" $job "* ]] || continue
    python3 -m place.node clean "$left"
    rm -rf "$left"
  done
}
trap 'end_ray' TERM INT
clean_ended
# What a host that lost its power, or a Ray that was killed, left of this job.
if [ "$role" = worker ]; then clean; install -d -m 700 "$PLACE_TMP"; fi
# The address of this node as the head sees it: the one that packets to the head leave from.
address=$(python3 -c 'import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((os.environ["PLACE_HEAD"], 9)); print(s.getsockname()[0])')
common=(--node-ip-address="$address" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
  --object-store-memory=$((${PLACE_OBJECT_STORE_MIB:-512} << 20)) --disable-usage-stats
  --dashboard-agent-listen-port=$((PLACE_PORT + 3)) --dashboard-agent-grpc-port=$((PLACE_PORT + 4))
  --runtime-env-agent-port=$((PLACE_PORT + 5)) --metrics-export-port=$((PLACE_PORT + 6))
  --node-manager-port=$((PLACE_PORT + 7)) --object-manager-port=$((PLACE_PORT + 8))
  --min-worker-port=0 --max-worker-port=0 --block)
if [ "$role" = head ]; then
  # With --disable-usage-stats Ray still sends one message, which says so: to nobody.
  export RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9
  ray start --head --port="$PLACE_PORT" --temp-dir="$PLACE_TMP/ray" --ray-client-server-port=$((PLACE_PORT + 2)) \
    --include-dashboard="${PLACE_DASHBOARD:-true}" --dashboard-host=127.0.0.1 --dashboard-port=$((PLACE_PORT + 1)) \
    "${common[@]}" >"$PLACE_TMP/ray.log" 2>&1 &
else
  # The head may not be up yet, or may have just come back.
  for _ in $(seq 120); do
    (exec 3<>"/dev/tcp/$PLACE_HEAD/$PLACE_PORT") 2>/dev/null && break
    sleep 0.5
  done
  ray start --address="$PLACE_HEAD:$PLACE_PORT" "${common[@]}" >"$PLACE_TMP/ray.log" 2>&1 &
fi
ray=$!
while :; do
  wait "$ray"; status=$?
  kill -0 "$ray" 2>/dev/null || break
done
if [ -z "$asked" ]; then
  echo "ray_node.sh: Ray's $role on $(hostname) ended with $status; the end of its log:" >&2
  tail -n 15 "$PLACE_TMP/ray.log" >&2
else
  status=0
fi
clean
exit "$status"
