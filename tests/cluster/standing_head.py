"""A standing Ray head of the tests' own: token, ports, a short temporary folder; only what was started is ended."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


class StandingHead(NamedTuple):
    """`address` of the head, `jobs` address of its job server, `environ` with the token that both ask for."""

    address: str
    jobs: str
    environ: dict[str, str]

    def run_ray(self, *arguments: str, **more: str) -> tuple[int, str]:
        """`ray ARGUMENTS` from the checkout: exit code and output. `more` goes into the environment."""
        environ = {**self.environ, "RAY_API_SERVER_ADDRESS": self.jobs, **more}
        done = subprocess.run(
            [str(BIN / "ray"), *arguments], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=250
        )
        return done.returncode, done.stdout + done.stderr


@contextmanager
def start_head(num_cpus: int) -> Iterator[StandingHead]:
    """A head of `num_cpus` cores for as long as the context lasts."""
    # Sockets lie below it, and their names end at 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pl", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(16))
    head, dashboard, client, agent = (str(port) for port in find_free_ports(4))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}
    environ |= {"PATH": f"{BIN}:{environ['PATH']}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    options = {
        "port": head,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "min-worker-port": "0",
        "max-worker-port": "0",
        "temp-dir": str(folder / "ray"),
        "num-cpus": str(num_cpus),
        "object-store-memory": str(200 << 20),
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
    try:
        jobs = f"http://127.0.0.1:{dashboard}"
        wait_for_job_server(jobs, (folder / "token").read_text(), process, folder / "head.log")
        yield StandingHead(f"127.0.0.1:{head}", jobs, environ)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_job_server(jobs: str, token: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until the job server answers; fails with the head's log."""
    request = urllib.request.Request(f"{jobs}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def end(process: subprocess.Popen, patience_s: float = 5) -> None:
    """End a process and all it started: asked first, then killed, each by its id."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=patience_s)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=30)


def find_free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
