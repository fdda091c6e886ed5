"""The rig for tests: several machines with a real Slurm, and what can befall them. Needs root and Debian's packages."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "DEADLINE")


class Rig:
    """Machines h1..hN behind a switch of their own, and `ctl`, from which jobs are submitted. Final."""

    def __init__(self, folder: Path, machines: int = 3, slurmd_timeout_s: int = 30):
        self.folder, self.machines = folder, machines
        self.small = folder / "small"
        self._off: set[str] = set()
        self._cut: set[str] = set()
        self.environ = {
            **os.environ,
            "SF_DIR": str(folder / "rig"),
            "SF_PREFIX": f"pl{os.getpid() % 10000}",
            "SLURMD_TIMEOUT": str(slurmd_timeout_s),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # The one temporary folder that each machine has for itself.
            "PLACE_TMP_ROOT": "/tmp/ray",
            "PLACE_DASHBOARD": "false",
        }

    @property
    def names(self) -> list[str]:
        return [f"h{number}" for number in range(1, self.machines + 1)]

    @contextmanager
    def running(self) -> Iterator[Rig]:
        """Everything up; everything down afterwards. All machines see `small`, a file system of 600 MiB."""
        self._script("setup.sh")
        self.small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "small", self.small], check=True)
        try:
            self._script("slurm-net.sh", "start", str(self.machines))
            yield self
        finally:
            self._script("slurm-net.sh", "stop")
            subprocess.run(["umount", self.small], check=True)

    def ctl(self, *command: str, check: bool = True, **environ: str) -> str:
        """A command on the login machine."""
        return self._script("slurm-net.sh", "run", *command, check=check, **environ)

    def on(self, machine: str, *command: str, check: bool = True) -> str:
        """A command on a machine."""
        return self._script("hosts.sh", "exec", machine, *command, check=check)

    def start_on(self, machine: str, *command: str, log: Path, **environ: str) -> subprocess.Popen:
        """Start a command on a machine; kill it there, for nsenter passes no signals on."""
        with log.open("a") as out:
            return subprocess.Popen(
                [_HERE / "hosts.sh", "exec", machine, *command],
                env={**self.environ, **environ},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def off(self, machine: str) -> None:
        """Cut its power: every process there is gone at once."""
        self._off.add(machine)
        self._script("hosts.sh", "off", machine)

    def boot(self, machine: str) -> None:
        """Power it on again, with its slurmd."""
        self._off.discard(machine)
        self._script("hosts.sh", "boot", machine)
        self._script("slurm-net.sh", "slurmd", machine)

    def cut(self, machine: str) -> None:
        """Pull its network cable."""
        self._cut.add(machine)
        self._script("hosts.sh", "cut", machine)

    def heal(self, machine: str) -> None:
        """Plug it in again."""
        self._cut.discard(machine)
        self._script("hosts.sh", "heal", machine)

    def repair(self) -> None:
        """Everything that a test left off or cut works again."""
        for machine in sorted(self._cut):
            self.heal(machine)
        for machine in sorted(self._off):
            self.boot(machine)

    def submit(self, *arguments: str, log: Path, **environ: str) -> int:
        """sbatch; returns the job's number."""
        command = [_HERE / "slurm-net.sh", "run", "sbatch", "--parsable", f"--output={log}", *arguments]
        done = subprocess.run(command, env={**self.environ, **environ}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def read_job(self, job: int) -> dict[str, str]:
        """scontrol's fields of a job; empty when slurmctld was too busy to answer."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ctl("scontrol", "-o", "show", "job", str(job), check=False)))

    def wait_for_end(self, job: int, timeout_s: float) -> dict[str, str]:
        """Wait until the job has ended for good; a requeued one is started at once instead of after two minutes."""
        state: dict[str, str] = {}

        def has_ended() -> bool:
            state.update(self.read_job(job))
            if state.get("JobState") == "PENDING" and state.get("Restarts") != "0":
                self.ctl("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
            return state.get("JobState") in _ENDED

        wait_until(has_ended, timeout_s, f"job {job} to end")
        return state

    @contextmanager
    def waiting_for_nodes(self, seconds: int) -> Iterator[None]:
        """Meanwhile Slurm gives a silent machine so long, as SlurmdTimeout says, before it takes it out of its job."""
        conf = self.folder / "rig" / "slurm.conf"
        before = conf.read_text()
        conf.write_text(re.sub(r"SlurmdTimeout=\d+", f"SlurmdTimeout={seconds}", before))
        self.ctl("scontrol", "reconfigure")
        try:
            yield
        finally:
            conf.write_text(before)
            self.ctl("scontrol", "reconfigure")

    def find_pids(self, machine: str, pattern: str) -> list[int]:
        """Process ids on the machine whose command line matches."""
        return [int(pid) for pid in self.on(machine, "pgrep", "-f", pattern, check=False).split()]

    def kill(self, machine: str, pids: list[int], signal: str = "KILL") -> None:
        """Send a signal to processes of a machine."""
        self.on(machine, "kill", f"-{signal}", *map(str, pids))

    def list_leftovers(self) -> list[str]:
        """Processes, shared memory, listening ports and temporary files that a machine had not when it was new."""
        found = []
        for machine in self.names:
            processes = self.on(machine, "ps", "-eo", "args=").splitlines()
            ours = ("init.sh", "munged", "slurmd", "sleep 1000", "ps -eo", "(")
            found += [f"{machine}: process {line[:120]}" for line in processes if not any(o in line for o in ours)]
            found += [f"{machine}: /dev/shm/{name}" for name in self.on(machine, "ls", "/dev/shm").split()]
            found += [f"{machine}: /tmp/ray/{name}" for name in self.on(machine, "ls", "/tmp/ray").split()]
            ports = self.on(machine, "ss", "-Hltn").splitlines()
            found += [f"{machine}: port {line.split()[3]}" for line in ports if not line.split()[3].endswith(":6818")]
        return found + [f"{path} in the checkout" for path in ROOT.glob("core*") if path.is_file()]

    def _script(self, name: str, *arguments: str, check: bool = True, **environ: str) -> str:
        environ = {**self.environ, **environ}
        command = [_HERE / name, *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, f"{name} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, seen: object = "") -> float:
    """Wait for a condition, looked at five times a second; returns how long it took. `seen` is shown on failure."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"waited {timeout_s:.0f} s for {what} {seen}"
        time.sleep(0.2)
    return time.monotonic() - began
