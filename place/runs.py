"""Which runs there are below a folder, and what each one's own files say about it: `place runs`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import yaml

from place.config import ClusterConfig, RunError, UsageError
from place.runlog import Tail, read_jsonl, read_newest_step

State = Literal["running", "done", "stopped", "failed", "unknown"]
TAIL_BYTES = 64 << 10
"""How much of the end of metrics.jsonl is read: about 150 lines, so that a list of long runs comes at once."""
QUIET_LINES = 3
"""Without a process to look at, a run counts as running for the time of a hung step and of this many lines."""
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError)
"""What files of a run that are not as PLACE wrote them raise, in whoever reads them or counts with what they hold."""


class Standing(NamedTuple):
    """Where a run stands; None where its folder does not say."""

    run: str
    state: State
    reason: str
    """Why it is in this state; empty where the state says all."""
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    """Total training loss of the last logged step."""
    val_loss: float | None = None
    samples_per_s: float | None = None
    """Pairs a second over all workers, at the last logged step."""
    eta_s: float | None = None
    """Seconds to the last step, validation and checkpoints included; of a running one only."""
    age_s: float | None = None
    """Seconds since the last record."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""
    attempts: int = 0
    workers: int | None = None


class Recorded(NamedTuple):
    """What is read of a run folder: JSON objects, oldest first."""

    config: dict[str, Any]
    about: dict[str, Any]
    """run.json."""
    attempts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    """The last lines alone."""
    saved_step: int | None
    outcome: dict[str, Any]
    """outcome.json, which a worker group leaves on Ray; empty without."""
    stop: str
    """Who asked it to stop; empty when nobody did."""


def list_runs(folders: list[Path]) -> list[Standing]:
    """Every run in or below the folders, in order of their paths.

    Raises:
        UsageError: a folder is not there.
    Source: ours.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; give one that holds runs, such as the parent of a run.dir")
    found = {run: None for folder in folders for run in find_runs(folder)}
    return [read_standing(run, time.time()) for run in found]


def is_run(folder: Path) -> bool:
    """Whether a `place pretrain` has begun here."""
    return (folder / "config.yaml").is_file() and (folder / "run.json").is_file()


def find_runs(folder: Path) -> Iterator[Path]:
    """Run folders in or below a folder; nothing is looked for inside a run, nor in hidden folders."""
    for path, names, _ in os.walk(folder):
        if is_run(Path(path)):
            names.clear()
            yield Path(path)
        names[:] = sorted(name for name in names if not name.startswith("."))


def read_standing(run: Path, now: float) -> Standing:
    """Where a run stands at the time `now` (seconds since 1970); damaged files make it `unknown` and say which."""
    try:
        with tell_damage(run):
            return compute_standing(str(run), read_recorded(run), now)
    except RunError as error:
        return Standing(str(run), "unknown", str(error))


@contextlib.contextmanager
def tell_damage(path: Path) -> Iterator[None]:
    """Say in one line what of a run cannot be read; errors that say it themselves pass as they are.

    Args:
        path: the file that is read within, or the run folder where it may be any of them.
    Raises:
        RunError: it is damaged.
    Source: ours.
    """
    try:
        yield
    except (RunError, UsageError):
        raise
    except DAMAGE as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        what = f"is no whole run folder ({said}); restore its files"
        raise RunError(f"{path} {what if path.is_dir() else f'cannot be read ({said}); restore it'}") from None


def read_recorded(run: Path) -> Recorded:
    """What a list of runs needs of a folder, without the weights. Raises RunError, which names the damaged file."""
    about, config, stop = run / "run.json", run / "config.yaml", run / "stop"
    with tell_damage(run / "attempts.jsonl"):
        attempts = list(read_jsonl(run / "attempts.jsonl"))
    with tell_damage(run / "metrics.jsonl"):
        metrics = list(Tail(run / "metrics.jsonl", TAIL_BYTES).read())
    recorded = Recorded(
        _read_sections(config, yaml.safe_load),
        _read_sections(about, json.loads),
        attempts,
        metrics,
        read_newest_step(run),
        _read_sections(run / "outcome.json", json.loads) if (run / "outcome.json").is_file() else {},
        (stop.read_text(errors="replace") or "asked") if stop.is_file() else "",
    )
    for name, section in recorded.config.items():
        if not isinstance(section, dict):
            raise RunError(f"{config} has {name}: {_show(section)}, expected its keys; restore it")
    if "plan" not in recorded.about:
        raise RunError(f"{about} has no 'plan'; restore it")
    return recorded


def _read_sections(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    with tell_damage(path):
        found = parse(path.read_text())
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {_show(found)}, expected names and values; restore it")
    return found


def _show(value: Any) -> str:
    return json.dumps(value, default=str)[:40]


def compute_standing(name: str, recorded: Recorded, now: float) -> Standing:
    """Where a run stands, from what its folder says.

    The newest attempt counts: after a restart from step 200 a run stands at 200, whatever was logged before.
    Source: ours.
    """
    launches = [record for record in recorded.attempts if "launch" in record]
    newest = launches[-1]["attempt"] if launches else None
    steps = [record for record in recorded.metrics if "samples_per_s" in record and record["attempt"] == newest]
    begun = [record["from_step"] for record in recorded.attempts if "from_step" in record]
    step = steps[-1]["step"] if steps else (begun[-1] if begun else 0)
    total = recorded.about["plan"]["total_steps"]
    latest = max((record["time"] for record in (*recorded.attempts, *recorded.metrics)), default=None)
    age_s = None if latest is None else max(0.0, now - latest)
    step_s = compute_step_s(steps, recorded.about["plan"]["global_batch"])
    state, reason = judge(recorded, step, age_s, step_s)
    values = [record for record in recorded.metrics if "total" in record]
    judged = [record["val_total"] for record in recorded.metrics if "val_total" in record]
    return Standing(
        name,
        state,
        reason,
        step,
        total,
        values[-1]["total"] if values else None,
        judged[-1] if judged else None,
        values[-1]["samples_per_s"] if values else None,
        (total - step) * step_s if state == "running" and step_s is not None else None,
        age_s,
        recorded.saved_step,
        len(launches),
        len(launches[-1]["workers"]) if launches else None,
    )


def compute_step_s(steps: list[dict[str, Any]], global_batch: int) -> float | None:
    """Seconds a step by the clock, with everything between the steps; None before the first logged one.

    Args:
        steps: the last logged steps of one attempt.
    Source: ours.
    """
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    if last["step"] > first["step"]:
        return (last["time"] - first["time"]) / (last["step"] - first["step"])
    return global_batch / last["samples_per_s"] if last["samples_per_s"] else None


def judge(recorded: Recorded, step: int, age_s: float | None, step_s: float | None) -> tuple[State, str]:
    """State of a run and why, by the strongest evidence that its folder holds.

    First how the command says that it ended, then checkpoints, then whether its process lives (looked at only on the
    same host), then what its last worker group left, and last of all how long ago something was written.
    Source: ours.
    """
    if recorded.attempts and "outcome" in recorded.attempts[-1]:
        return recorded.attempts[-1]["outcome"], recorded.attempts[-1].get("why", "")
    total, saved = recorded.about["plan"]["total_steps"], recorded.saved_step
    if saved is not None and saved >= total:
        return "done", ""
    lives = is_alive(recorded)
    if lives:
        return "running", f"asked to stop ({recorded.stop})" if recorded.stop else ""
    left = _read_outcome(recorded)
    if left:
        return left["outcome"], left.get("message", recorded.stop)
    if recorded.stop and saved is not None and saved >= step:
        return "stopped", recorded.stop
    where = "before the first checkpoint" if saved is None else f"the newest checkpoint is of step {saved}"
    if lives is False:
        return "failed", f"its process ended without a word; {where}"
    config = recorded.config.get("cluster", {})
    hang_s = config.get("hang_timeout_s", ClusterConfig.model_fields["hang_timeout_s"].default)
    interval = recorded.config.get("run", {}).get("log_every_steps", 1)
    if age_s is not None and age_s <= hang_s + QUIET_LINES * interval * (step_s or 0.0):
        return "running", f"asked to stop ({recorded.stop})" if recorded.stop else ""
    said = "nothing was recorded yet" if age_s is None else f"nothing was recorded for {format_span(age_s)}"
    return "unknown", f"{said}; {where}"


def _read_outcome(recorded: Recorded) -> dict[str, Any]:
    """What the newest start's workers left behind on Ray; empty where they left nothing, or another start follows."""
    starts = [record for record in recorded.attempts if "launch" in record or "command" in record]
    launch = starts[-1].get("launch") if starts else None
    return recorded.outcome if launch and recorded.outcome.get("launch") == launch else {}


def is_alive(recorded: Recorded) -> bool | None:
    """Whether the run's command still works; None where this host cannot know.

    A run by the local launcher is one process, its worker; otherwise the command must have said who it is.
    """
    own = [record for record in recorded.attempts if "command" in record]
    launches = [record for record in recorded.attempts if "launch" in record]
    if own:
        who, since = own[-1]["command"], own[-1]["time"]
    elif launches and recorded.config.get("cluster", {}).get("launcher") == "local":
        who, since = launches[-1]["workers"][0], launches[-1]["time"]
    else:
        return None
    if who["host"] != socket.gethostname():
        return None
    try:
        process = psutil.Process(who["pid"])
        # A process id is given away again: the one that is meant is older than what it wrote.
        return process.create_time() <= since + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def format_span(seconds: float) -> str:
    """A length of time in one unit or two, such as `42 s`, `12 min`, `3 h 05 min`, `2 d 04 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 99.5:
        return f"{minutes:.0f} min"
    if hours < 48:
        whole, rest = divmod(round(minutes), 60)
        return f"{whole} h {rest:02} min"
    whole, rest = divmod(round(hours), 24)
    return f"{whole} d {rest:02} h" if days < 100 else f"{whole} d"
