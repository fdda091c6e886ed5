"""Checks of one machine: software, GPUs, attention, compiler, shared memory, limits, disk, ports. No network."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from place.cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding

MIB, GIB = 1 << 20, 1 << 30
LIBRARIES = (
    "torch",
    "deepspeed",
    "ray",
    "mosaicml-streaming",
    "transformers",
    "timm",
    "pyarrow",
    "pydicom",
    "numpy",
)
# The head's own port, the dashboard's, Ray client's; torchrun's.
PORTS = {6379: "Ray's head", 8265: "Ray's job server", 10001: "Ray client", 29500: "torchrun"}
WORKER_PORTS = range(10002, 20000)
STALE_NAME = re.compile(r"^\d{6}_\w+$")


def check_software(pins: dict[str, str]) -> list[Finding]:
    """Versions of what PLACE stands on, against constraints.txt."""
    installed = {name: _read_version(name) for name in LIBRARIES}
    text = f"python {'.'.join(map(str, os.sys.version_info[:3]))}, " + ", ".join(  # type: ignore[attr-defined]
        f"{name} {version or 'absent'}" for name, version in installed.items()
    )
    missing = [name for name, version in installed.items() if version is None]
    if missing:
        return [Finding("software", FAIL, text, f"install {', '.join(missing)}: pip install -c constraints.txt -e .")]
    off = [name for name in LIBRARIES if name in pins and str(installed[name]).split("+")[0] != pins[name]]
    if off:
        wanted = ", ".join(f"{name}=={pins[name]}" for name in off)
        return [Finding("software", WARN, text, f"PLACE is tested with {wanted}: pip install -c constraints.txt -e .")]
    return [Finding("software", OK, text + ("" if pins else "; no constraints.txt to compare with"))]


def check_gpus() -> list[Finding]:
    """GPUs that torch sees, their memory and links; and a driver that torch cannot use."""
    import torch

    driver = _ask_nvidia("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()
    build = f"torch for CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    if not torch.cuda.is_available():
        if driver or Path("/dev/nvidia0").exists():
            advice = "install the CUDA build (pip install -c constraints.txt -e .[gpu]) or a newer NVIDIA driver"
            return [Finding("gpu", FAIL, f"driver {driver or 'unknown'}, but {build} sees no GPU", advice)]
        return [Finding("gpu", SKIP, f"no GPU here ({build}): training would run on the CPU")]
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_properties(index).name for index in range(count)}
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(count)) / GIB
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    text = f"{count} x {' / '.join(sorted(names))}, {memory:.0f} GiB, driver {driver}, {build}, NCCL {nccl}"
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    linked = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    nvlinks = len(re.findall(r"\bNV\d+\b", _ask_nvidia("topo", "-m"))) if count > 1 else 0
    if pairs:
        text += f", peer access {linked}/{len(pairs)} pairs, NVLink {nvlinks}/{len(pairs)}"
    if linked < len(pairs):
        advice = "gathers between GPUs go through host memory: check IOMMU/ACS settings and `nvidia-smi topo -m`"
        return [Finding("gpu", WARN, text, advice)]
    return [Finding("gpu", OK, text)]


def check_attention() -> list[Finding]:
    """The attention backend that `model.attention=auto` takes here."""
    import torch
    from place.kernels.attention import choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = choose_backend("auto", device)
    if device.type == "cuda" and backend != "xformers":
        return [Finding("attention", WARN, f"{backend}: {reason}", "pip install -c constraints.txt -e .[gpu]")]
    return [Finding("attention", OK, f"{backend}: {reason}")]


def check_compiler(is_needed: bool) -> list[Finding]:
    """The C compiler and Python's headers that Triton and torch.compile build with, before the first step on a GPU."""
    if not is_needed:
        return []
    # As Triton looks for it.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    advice = "install gcc and Python's headers (python3-dev, python3-devel), or set CC"
    if compiler is None:
        return [Finding("compiler", FAIL, "no C compiler: Triton cannot start a kernel", advice)]
    headers = sysconfig.get_paths()["include"]
    words = [*shlex.split(compiler), f"-I{headers}", "-fsyntax-only", "-x", "c", "-"]
    source = "#include <stdlib.h>\n#include <Python.h>\n"
    try:
        done = subprocess.run(words, input=source, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return [Finding("compiler", FAIL, f"{compiler}: {error.strerror}", advice)]
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "it fails")
        return [Finding("compiler", FAIL, f"{compiler} does not compile against {headers}: {said}", advice)]
    return [Finding("compiler", OK, f"{compiler} with {headers}")]


def check_shared_memory(root: Path = Path("/dev/shm"), need_gib: float = 2.0) -> list[Finding]:
    """Size of /dev/shm, and segments of streaming that no process holds any more."""
    usage = shutil.disk_usage(root)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB of {root} free"
    size = Finding("shared memory", OK, text)
    if usage.free < need_gib * GIB:
        advice = f"Ray and loader workers want {need_gib:.0f} GiB and more: docker --shm-size, or a larger tmpfs"
        size = Finding("shared memory", WARN, text, advice)
    stale = find_stale_segments(root)
    if not stale:
        return [size]
    prefixes = sorted({name.split("_")[0] for name in stale})
    text = f"{len(stale)} segments of killed runs in {root} ({', '.join(prefixes[:5])}{', ...' * (len(prefixes) > 5)})"
    advice = f"when no run of yours is starting: rm {' '.join(f'{root}/{prefix}_*' for prefix in prefixes[:5])}"
    return [size, Finding("stale segments", WARN, text, advice)]


def find_stale_segments(root: Path) -> list[str]:
    """Streaming's segments of this user that no process of this user maps or holds open."""
    mine = [path.name for path in root.iterdir() if STALE_NAME.match(path.name) and path.stat().st_uid == os.geteuid()]
    if not mine:
        return []
    held: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        held |= _read_held(process, root)
    return sorted(name for name in mine if name not in held)


def check_limits(infiniband: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Open files, processes, locked memory (for InfiniBand), and the memory this process may use."""
    files, processes = (resource.getrlimit(what)[0] for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    has_infiniband = infiniband.is_dir() and any(infiniband.iterdir())
    text = f"open files {_say(files)}, processes {_say(processes)}, locked memory {_say(locked, MIB, ' MiB')}"
    advice = []
    if 0 <= files < 8192:
        advice.append("ulimit -n 65536 (Ray and loader workers open many files)")
    if 0 <= processes < 4096:
        advice.append("ulimit -u 65536")
    if has_infiniband and locked >= 0:
        advice.append("ulimit -l unlimited (InfiniBand pins memory)")
    return [Finding("limits", WARN if advice else OK, text, "; ".join(advice))]


def check_disk(folders: Iterable[tuple[str, Path]]) -> list[Finding]:
    """Free space where a run writes."""
    free = {f"{label} {folder}": shutil.disk_usage(find_existing(folder)).free / GIB for label, folder in folders}
    text = ", ".join(f"{where}: {gib:.1f} GiB free" for where, gib in free.items())
    if min(free.values()) < 0.5:
        return [Finding("disk", FAIL, text, "free some, or choose another folder")]
    if min(free.values()) < 20:
        return [Finding("disk", WARN, text, "a checkpoint of ViT-B/16 + BERT base takes 3 GiB, three are kept")]
    return [Finding("disk", OK, text)]


def check_ports(ports: dict[int, str] | None = None) -> list[Finding]:
    """Whether the ports that Ray and torchrun take by default are free, and Ray's range for workers."""
    wanted = PORTS if ports is None else ports
    taken = [f"{port} ({user})" for port, user in wanted.items() if not _is_free(port)]
    listening = _read_listening()
    in_range = len([port for port in listening if port in WORKER_PORTS])
    text = f"{', '.join(map(str, wanted))} free; {in_range} of Ray's worker ports 10002 to 19999 in use"
    if taken:
        advice = "if they are not yours, give Ray others: ray start --port --dashboard-port --ray-client-server-port"
        return [Finding("ports", WARN, f"in use: {', '.join(taken)}", advice)]
    if in_range > len(WORKER_PORTS) // 2:
        return [Finding("ports", WARN, text, "ray start --min-worker-port --max-worker-port with another range")]
    return [Finding("ports", OK, text)]


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def build_host_checks(pins: dict[str, str], folders: list[tuple[str, Path]], ports: bool) -> dict[str, Callable]:
    """All checks of one machine by name."""
    checks: dict[str, Callable] = {
        "software": lambda: check_software(pins),
        "gpu": check_gpus,
        "attention": check_attention,
        "compiler": lambda: check_compiler(_has_gpu()),
        "shared memory": check_shared_memory,
        "limits": check_limits,
        "disk": lambda: check_disk(folders),
    }
    return {**checks, "ports": check_ports} if ports else checks


def read_pins(path: Path) -> dict[str, str]:
    """`name==version` lines of a constraints file; empty where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pairs}


def _read_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _ask_nvidia(*arguments: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout if done.returncode == 0 else ""


def _read_held(process: Path, root: Path) -> set[str]:
    """Names below `root` that a process maps."""
    try:
        lines = (process / "maps").read_text().splitlines()
    except OSError:  # it ended, or is another user's
        return set()
    mark = f"{root}/"
    return {line.split(mark, 1)[1].split(" ")[0] for line in lines if mark in line}


def _read_listening() -> set[int]:
    """TCP ports that someone listens on."""
    ports = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = table.read_text().splitlines()[1:] if table.is_file() else []
        fields = [row.split() for row in rows]
        ports |= {int(field[1].rsplit(":", 1)[1], 16) for field in fields if field[3] == "0A"}
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _say(limit: int, unit: int = 1, suffix: str = "") -> str:
    return "unlimited" if limit < 0 else f"{limit / unit:,.0f}{suffix}"
