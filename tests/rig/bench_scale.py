"""`place scale` on machines of the rig: a ladder, a network of known rates, and a machine that is cut off.

    python tests/rig/bench_scale.py --output build/scale        (root; `make bench-scale`)

Starts three machines in network namespaces (hosts.sh) with a Ray of one core on each, and calls `place scale` on the
first. `ladder`: 1, 2 and 3 machines with all probes. `shaped`: three machines at 100 and 300 Mbit/s, from which the
exposed communication at 200 Mbit/s is predicted. `cut`: the third machine's cable is pulled while three train; that
rung must be a row with its reason, and the next one must run.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RATES_MBIT = (100, 300, 200)
HEAD = "10.77.0.11"
PORT = 24000
LIMIT = 0.25


class Machines:
    """Three machines with Ray, and what can be done to their network. Final."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {
            **os.environ,
            "SF_DIR": str(folder / "rig"),
            "SF_PREFIX": f"sc{os.getpid() % 10000}",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PLACE_HEAD": HEAD,
            "PLACE_PORT": str(PORT),
            # The one temporary folder that each machine has for itself.
            "PLACE_TMP": "/tmp/ray/place-scale",
            "PLACE_DASHBOARD": "false",
            "SLURM_CPUS_ON_NODE": "1",
            "RAY_ADDRESS": f"{HEAD}:{PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "RAY_health_check_initial_delay_ms": "5000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
        }

    def __enter__(self) -> Machines:
        self.call("up", "3")
        for machine in ("h1", "h2", "h3"):
            self.start_ray(machine)
        return self

    def __exit__(self, *_: object) -> None:
        self.call("down")

    def call(self, *words: str) -> None:
        """hosts.sh."""
        subprocess.run(
            ["bash", str(HERE / "hosts.sh"), *words], check=True, env=self.environ, stdout=subprocess.DEVNULL
        )

    def start(self, machine: str, command: str, log: Path) -> subprocess.Popen:
        """Start a command on a machine; it ends with the machine."""
        words = ["bash", str(HERE / "hosts.sh"), "exec", machine, "bash", "-c", command]
        with log.open("a") as out:
            return subprocess.Popen(words, env=self.environ, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)

    def start_ray(self, machine: str) -> None:
        """Its Ray; one that was cut off for long enough has ended."""
        role = "head" if machine == "h1" else "worker"
        self.start(machine, f"bash {ROOT}/slurm/ray_node.sh {role}", self.folder / f"ray-{machine}.log")

    def shape(self, mbit: int) -> None:
        """Every machine sends and receives at most so much."""
        for machine in ("h1", "h2", "h3"):
            self.call("rate", machine, f"{mbit}mbit")

    def scale(self, name: str, ladder: dict[str, Any]) -> subprocess.Popen:
        """Start `place scale` on the first machine; the screen goes to NAME.log."""
        base = str(ROOT / "configs" / "scale" / "tiny.yaml")
        ladder = {"base": base, "folder": str(self.folder / name), **ladder}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(ladder))
        data = self.folder / "data"
        return self.start("h1", f"place scale --config {path} data.path={data}", self.folder / f"{name}.log")

    def read(self, name: str) -> dict[str, Any]:
        """What `place scale` found."""
        return json.loads((self.folder / name / "scaling.json").read_text())


def run_ladder(machines: Machines) -> list[str]:
    """1, 2 and 3 machines. Returns a line for each thing that is not as it must be."""
    rungs = [{"workers": count} for count in (1, 2, 3)]
    network = {"name": "rig", "bandwidth_gbit": 10, "latency_us": 50}
    machines.scale("ladder", {"rungs": rungs, "network": network, "steps": 40, "warmup_steps": 10}).wait()
    rows = machines.read("ladder")["rows"]
    faults = [f"{row['rung']}, {row['probe']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    full = [row for row in rows if row["probe"] == "full" and row["status"] == "ok"]
    faults += [f"{row['rung']}: phases miss {row['unexplained']:.1%}" for row in full if row["unexplained"] > 0.03]
    faults += [f"{row['rung']}: losses {row['loss_apart']:.1e} apart" for row in full[1:] if row["loss_apart"] > 1e-3]
    faults += [f"{row['rung']}: no restart" for row in full if not row.get("restart_s")]
    wanted = ("scaling.html", "scaling.csv", "scaling.json", "scaling.png")
    return faults + [f"no {name}" for name in wanted if not (machines.folder / "ladder" / name).is_file()]


def run_shaped(machines: Machines) -> list[str]:
    """Fitted at two rates, held out at a third."""
    rungs: list[dict[str, Any]] = []
    for mbit in RATES_MBIT:
        machines.shape(mbit)
        network = {"name": f"{mbit} Mbit/s", "bandwidth_gbit": mbit / 1000}
        held_out = mbit == RATES_MBIT[-1]
        rungs.append({"workers": 3, "name": f"{mbit} Mbit/s", "network": network, "hold_out": held_out})
        ladder = {"rungs": rungs, "probes": [], "repeats": 5, "steps": 15, "warmup_steps": 5}
        machines.scale("shaped", ladder).wait()
    for machine in ("h1", "h2", "h3"):
        machines.call("unrate", machine)
    row = next(row for row in machines.read("shaped")["model"]["rungs"] if row["hold_out"])
    measured, predicted = row["measured"]["exposed"], row["predicted"]["exposed"][0]
    off = abs(predicted / measured - 1)
    say(f"held out {row['rung']}: exposed {measured:.3f} s, predicted {predicted:.3f} s, off by {off:.1%}")
    return [f"the model is off by {off:.1%}"] if off > LIMIT else []


def run_cut(machines: Machines) -> list[str]:
    """A machine is cut off while three train."""
    rungs = [{"workers": 2}, {"workers": 3}, {"workers": 2, "name": "2 workers again"}]
    ladder = {"rungs": rungs, "probes": [], "steps": 60, "warmup_steps": 10}
    started = machines.scale("cut", ladder)
    metrics = machines.folder / "cut" / "3_workers" / "full0" / "run" / "metrics.jsonl"
    while started.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.2)
    machines.call("cut", "h3")
    code = started.wait()
    machines.call("heal", "h3")
    machines.start_ray("h3")
    rows = {row["rung"]: row for row in machines.read("cut")["rows"]}
    say(f"cut off: 3 workers {rows['3 workers']['status']}, {rows['3 workers']['reason']}")
    states = [rows[name]["status"] for name in ("2 workers", "3 workers", "2 workers again")]
    faults = [] if states == ["ok", "failed", "ok"] else [f"rows are {states}"]
    return faults + ([] if code == 1 else [f"place scale ended with {code}"])


CASES = {"ladder": run_ladder, "shaped": run_shaped, "cut": run_cut}


def say(line: str) -> None:
    """On the screen at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the cases; 1 where one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/scale"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    asked = parser.parse_args()
    folder = asked.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "card.json").is_file():
        words = ["--source", "phantom", "--count", "1200", "--size-px", "80", "--output"]
        subprocess.run([sys.executable, "-m", "place", "prepare", *words, str(folder / "data")], check=True, cwd=ROOT)
    faults = []
    with Machines(folder) as machines:
        for name in asked.cases:
            began = time.monotonic()
            found = CASES[name](machines)
            say(f"{name}: {'; '.join(found) or 'as it must be'} ({time.monotonic() - began:.0f} s)")
            say((folder / f"{name}.log").read_text())
            faults += found
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
