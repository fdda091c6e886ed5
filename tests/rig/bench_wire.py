"""Bytes that a training step puts on the wire, ZeRO stage by stage, beside what was called and what must be.

    python tests/rig/bench_wire.py --hosts 3 --output build/wire.json        (root; `make bench-wire`)

Starts machines in network namespaces (hosts.sh), one worker on each by torchrun, and reads the counters of their
network cards before and after some steps; what as much time of waiting would send is subtracted. Collectives are
counted where torch hands them to the backend, and turned into bytes by the cost of a ring: the least that is needed.

DeepSpeed's ZeRO 1 and 2 all-reduce whole buckets, half as much again as they must send: few large messages, where a
reduction to each owner (`engine.gradient_reduction=reduce`, rows of their own) is one message an owner and bucket. gloo
has no reduce or reduce_scatter at the cost of a ring (its reduce_scatter is an all-reduce); NCCL has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
STEPS, WARM_UP, IDLE_S = 3, 2, 3.0
LIMIT = 1.15
HEADER = "row                    MB/step   called  ratio    bound  ratio  collectives a step"


class Row(NamedTuple):
    """An engine to measure, and how often each parameter's bytes must cross the wire: in units of (world - 1)."""

    name: str
    options: dict[str, Any]
    bound: int


ROWS = [
    Row("DDP", {"kind": "ddp"}, 2),
    Row("torch", {"kind": "torch"}, 2),
    *(Row(f"ZeRO-{stage}", {"kind": "deepspeed", "zero_stage": stage}, 3 if stage == 3 else 2) for stage in range(4)),
    Row(
        "ZeRO-3 scatter",
        {"kind": "deepspeed", "zero_stage": 3, "deepspeed": {"zero_optimization": {"reduce_scatter": True}}},
        3,
    ),
    *(
        Row(f"ZeRO-{stage} reduce", {"kind": "deepspeed", "zero_stage": stage, "gradient_reduction": "reduce"}, 2)
        for stage in (1, 2)
    ),
]
COSTS = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "allgather_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "reduce_": 1,
    "broadcast_": 1,
}
"""What a ring sends over all ranks, in units of (world - 1) x the bytes of the whole tensor."""


def main() -> int:
    """Measure all rows on machines of the rig, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/wire.json"))
    parser.add_argument("--hosts-sh", type=Path, default=HERE / "hosts.sh")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the machines are stopped
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        measured = run_on_hosts(given.hosts, given.hosts_sh, Path(folder))
    given.output.write_text(json.dumps(measured, indent=1))
    print(f"{given.hosts} machines, gloo, model of {measured['model_bytes'] / 1e6:.1f} MB, {STEPS} steps a row")
    print("MB over all machines; called: the collectives by the cost of a ring; bound: what the stage must send")
    print(HEADER)
    print("\n".join(format_row(row) for row in measured["rows"]))
    above = [row["name"] for row in measured["rows"] if row["ratio_called"] > LIMIT]
    print(f"more than {LIMIT} x the collectives called: {', '.join(above) or 'none'}; written to {given.output}")
    return 0


def run_on_hosts(world: int, hosts_sh: Path, folder: Path) -> dict[str, Any]:
    """Start the machines, run a worker on each, and stop them whatever happens."""
    names = {"SF_DIR": str(folder / "rig"), "SF_PREFIX": f"w{os.getpid() % 10000}"}
    rig = {**os.environ, **names}
    subprocess.run(["bash", str(hosts_sh), "up", str(world)], check=True, env=rig)
    try:
        address = "10.77.0.11"
        workers = []
        for rank in range(world):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(world), "--node-rank", str(rank)]
            torchrun += ["--nproc-per-node", "1", "--master-addr", address, "--master-port", "29511"]
            command = ["bash", str(hosts_sh), "exec", f"h{rank + 1}", *torchrun, __file__, "--worker", str(folder)]
            environment = {**rig, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            log = (folder / f"{rank}.log").open("w")
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise SystemExit(f"workers ended with {codes}:\n{(folder / '0.log').read_text()[-3000:]}")
        return json.loads((folder / "measured.json").read_text())
    finally:
        subprocess.run(["bash", str(hosts_sh), "down"], check=False, env=rig)


def format_row(row: dict[str, Any]) -> str:
    """A line of the table."""
    calls = ", ".join(f"{kind.strip('_')} x{call['count']:g}" for kind, call in row["collectives"].items())
    numbers = f"{row['wire'] / 1e6:7.1f}  {row['called'] / 1e6:7.1f}  {row['ratio_called']:5.3f}  "
    return f"{row['name']:<20}  {numbers}{row['bound'] / 1e6:7.1f}  {row['ratio_bound']:5.3f}  {calls}"


def work(folder: Path) -> None:
    """One worker: every row in turn; rank 0 writes what all of them measured."""
    import torch
    import torch.distributed as dist

    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    from place.compat import patch_torchvision

    patch_torchvision()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [measure(row) for row in ROWS]
    if dist.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps({"model_bytes": rows[0]["model_bytes"], "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


def measure(row: Row) -> dict[str, Any]:
    """Bytes a step of one engine."""
    import torch
    import torch.distributed as dist

    step, model_bytes = build_step(row.options)
    for _ in range(WARM_UP):
        step()
    with count_collectives() as called:
        step()
    dist.barrier()
    began, sent = time.perf_counter(), read_sent()
    for _ in range(STEPS):
        step()
    dist.barrier()
    took_s, sent = time.perf_counter() - began, read_sent() - sent
    idle = read_sent()
    time.sleep(IDLE_S)
    idle = (read_sent() - idle) * took_s / IDLE_S
    total = torch.tensor([sent - idle, idle], dtype=torch.float64)
    dist.all_reduce(total)
    world = dist.get_world_size()
    wire = total[0].item() / STEPS
    called_bytes = sum(COSTS[kind] * size * (world - 1) for kind, size in called.bytes.items())
    bound = row.bound * (world - 1) * model_bytes
    kinds = {kind: {"count": count, "bytes": called.bytes[kind]} for kind, count in called.counts.items()}
    result = {"name": row.name, "model_bytes": model_bytes, "wire": wire, "called": called_bytes, "bound": bound}
    ratios = {"ratio_called": wire / called_bytes, "ratio_bound": wire / bound}
    return {**result, **ratios, "idle": total[1].item() / STEPS, "step_s": took_s / STEPS, "collectives": kinds}


def build_step(options: dict[str, Any]) -> tuple[Any, int]:
    """A training step of an engine on random pairs, and the bytes of its model in fp32."""
    import torch
    import torch.distributed as dist
    from place.cluster.worker import ENGINES
    from tiny import VOCAB, build_batch, build_tiny_config

    from place.losses.objective import compute_losses
    from place.model.place import build_model
    from place.training.gradcache import backward_contrast

    world, rank = dist.get_world_size(), dist.get_rank()
    kind = options["kind"]
    engine_options = {**options, "kind": "torch"} if kind == "ddp" else options
    vision = {"overrides": {"patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}}
    config = build_tiny_config(
        engine=engine_options,
        model={"vision": vision, "text": {"width": 256, "depth": 6, "num_heads": 4}, "joint_width": 256},
        train={"global_batch": 2 * world},
    )
    device = torch.device("cpu")
    torch.manual_seed(0)
    model, _ = build_model(config, VOCAB, device)
    model_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    batch = build_batch(2 * world, 0, config).chunks(world)[rank]

    def objective(outputs: Any, pairs: Any) -> Any:
        return compute_losses(outputs, pairs, config.loss, 1 / 255)

    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            objective(wrapped(batch), batch).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        engine = ENGINES[kind](model, config, device)

        def step() -> None:
            backward_contrast(engine, batch, 1, objective)
            engine.step(1e-4)

    return step, model_bytes


class Calls:
    """Collectives by kind: how many, and the bytes of the whole tensors."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()


def count_collectives() -> Any:
    """A context in which every collective is counted, whoever calls it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def weigh(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(weigh(item) for item in value) if isinstance(value, list | tuple) else 0

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = Calls()

        def __enter__(self) -> Calls:
            super().__enter__()
            return self.calls

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and (kind := func._schema.name.partition("::")[2]) in COSTS:
                self.calls.counts[kind] += 1
                # gathers and scatters name both their whole tensor and this rank's part of it
                self.calls.bytes[kind] += max(weigh(argument) for argument in args)
            return func(*args, **(kwargs or {}))

    return Count()


def read_sent() -> int:
    """Bytes this machine has sent over its network card."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    raise SystemExit("no eth0: run on a machine of the rig")


if __name__ == "__main__":
    raise SystemExit(main())
