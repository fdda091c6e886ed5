"""`place doctor`: what it finds on this machine, over processes and over a Ray cluster; that it says what to do."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from place.cluster.doctor import host, storage
from place.cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding, exit_code, merge_hosts, run_check
from place.cluster.doctor.first_batch import check_first_batch
from place.cluster.doctor.network import check_local_collectives, describe_collectives
from place.cluster.doctor.ray_cluster import STOP_WAIT, check_head, check_stop_wait, check_usage_stats
from place.cluster.doctor.run import read_launcher
from standing_head import start_head
from training.runs import run_place, write_config

from place import cli
from place.config import build_config

MEASURED = {"world": 2, "backend": "gloo", "size_mib": 16, "all_reduce_gib_s": 1.0, "all_gather_gib_s": 1.0}
MEASURED |= {"latency_ms": 0.1, "clock_skew_s": 0.0, "clock_jitter_s": 0.001}


def read_states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def test_a_laptop_is_looked_over_and_every_line_that_is_not_fine_says_why(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = write_config(tmp_path, prepared)
    code = cli.main(["doctor", "--config", str(config), "--json", "--timeout", "60"])
    findings = [Finding(**item) for item in json.loads(capsys.readouterr().out)]
    states = read_states(findings)
    assert code == exit_code(findings) == 0
    wanted = "topology software gpu attention limits disk ports collectives storage data"
    assert set(states) >= {*wanted.split(), "first batch", "shared memory"}
    assert states["collectives"] == states["first batch"] == states["software"] == OK
    assert all(finding.advice for finding in findings if finding.state in (WARN, FAIL))
    assert not (tmp_path / "run").exists(), "a look must not make the run folder"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_triton_needs_a_compiler_and_pythons_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert host.check_compiler(False) == []
    assert read_states(host.check_compiler(True)) == {"compiler": OK}
    monkeypatch.setattr(host.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (finding,) = host.check_compiler(True)
    assert finding.state == FAIL
    assert f"does not compile against {tmp_path}" in finding.text
    assert "Python.h" in finding.text
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert "No such file or directory" in host.check_compiler(True)[0].text
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = host.check_compiler(True)
    assert (finding.state, finding.text) == (FAIL, "no C compiler: Triton cannot start a kernel")
    assert "gcc" in finding.advice


def test_the_screen_has_a_line_a_finding_and_a_sum(capsys: pytest.CaptureFixture[str]) -> None:
    from place.screen import print_findings

    print_findings([Finding("disk", FAIL, "full [/x]", "free some", ("h1", "h2")), Finding("gpu", OK, "8")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["FAIL", "disk", "full", "[/x]", "[h1,", "h2]"]
    assert lines[1].strip() == "-> free some"
    assert lines[-1] == "1 OK, 1 FAIL"


def test_a_check_that_hangs_is_a_failure_after_its_time() -> None:
    began = time.monotonic()
    (finding,) = run_check("storage", lambda: time.sleep(30) or [], 0.2)
    assert time.monotonic() - began < 5
    assert (finding.state, finding.text) == (FAIL, "no answer within 0 s")


def test_a_check_that_breaks_is_a_failure_with_its_reason() -> None:
    def break_down() -> list[Finding]:
        raise OSError("no such device")

    (finding,) = run_check("gpu", break_down, 5)
    assert (finding.state, finding.text) == (FAIL, "OSError: no such device")


def test_findings_of_many_nodes_become_few_lines_with_the_worst_first() -> None:
    found = [Finding("disk", OK, f"{number} GiB", hosts=(f"h{number}",)) for number in range(1, 16)]
    found += [Finding("disk", FAIL, "full", "free some", ("h16",)), Finding("gpu", OK, "8", hosts=("h1",))]
    lines = merge_hosts(found)
    assert [(line.check, line.state, len(line.hosts)) for line in lines] == [
        ("disk", FAIL, 1),
        ("disk", OK, 15),
        ("gpu", OK, 1),
    ]
    assert exit_code(lines) == 1


def test_other_versions_than_the_pinned_ones_are_named() -> None:
    (finding,) = host.check_software({"numpy": "1.0.0"})
    assert finding.state == WARN
    assert "numpy==1.0.0" in finding.advice
    (finding,) = host.check_software(host.read_pins(Path(__file__).parents[2] / "constraints.txt"))
    assert finding.state == OK


def test_shared_memory_that_is_too_small_is_told(tmp_path: Path) -> None:
    assert read_states(host.check_shared_memory(tmp_path, need_gib=1e9)) == {"shared memory": WARN}
    assert read_states(host.check_shared_memory(tmp_path, need_gib=0)) == {"shared memory": OK}


def test_only_segments_that_nobody_holds_are_stale(tmp_path: Path) -> None:
    import mmap

    for name in ("000001_locals", "000002_locals", "other"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    with (tmp_path / "000002_locals").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert host.find_stale_segments(tmp_path) == ["000001_locals"]
    stale = host.check_shared_memory(tmp_path, need_gib=0)[1]
    assert (stale.check, stale.state) == ("stale segments", WARN)
    assert f"rm {tmp_path}/000001_*" in stale.advice


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (finding,) = host.check_ports({port: "Ray's head"})
        assert (finding.state, str(port) in finding.text) == (WARN, True)
    assert host.check_ports({port: "Ray's head"})[0].state == OK


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes: list[float] = [0.1, 5, 500]
    found = []
    for gib in sizes:
        usage = type("Usage", (), {"free": gib * host.GIB})
        monkeypatch.setattr(host.shutil, "disk_usage", lambda _, usage=usage: usage)
        found.append(host.check_disk([("run.dir", tmp_path / "not" / "yet")])[0].state)
    assert found == [FAIL, WARN, OK]


def test_infiniband_wants_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(host.resource, "getrlimit", lambda what: (65536, 65536))
    (finding,) = host.check_limits(tmp_path)
    assert (finding.state, finding.advice.startswith("ulimit -l unlimited")) == (WARN, True)
    assert host.check_limits(tmp_path / "none")[0].state == OK


def test_writing_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    (finding,) = storage.check_writing(tmp_path / "not" / "yet", size_mib=8)
    assert finding.state in (OK, WARN)
    assert "MiB/s" in finding.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert storage.check_writing(tmp_path / "theirs")[0].state == FAIL


def test_a_run_folder_that_cannot_be_asked_for_fails() -> None:
    mark, (finding,) = storage.write_mark(Path("/proc/run"))
    assert (mark, finding.check, finding.state) == (None, "shared folder", FAIL)
    assert "/proc cannot be written" in finding.text


@pytest.mark.parametrize("address", ["auto", "localhost", "ray://127.0.0.1:9"])
def test_a_head_that_was_not_asked_is_not_said_to_be_open(address: str) -> None:
    (finding,) = check_head(address, {})
    assert (finding.state, "not asked" in finding.text) == (SKIP, True)


@pytest.mark.parametrize(
    ("stop_wait", "usage_stats", "states"),
    [(None, None, (WARN, WARN)), ("59", "1", (WARN, WARN)), ("60", "0", (OK, OK)), ("long", "", (WARN, WARN))],
)
def test_a_head_without_our_settings_is_told(
    stop_wait: str | None, usage_stats: str | None, states: tuple[str, str]
) -> None:
    findings = check_stop_wait(stop_wait), check_usage_stats(usage_stats)
    assert tuple(finding.state for finding in findings) == states


def test_a_disk_that_fills_up_under_the_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_write", write)
    (finding,) = storage.check_writing(tmp_path)
    assert (finding.state, "No space left on device" in finding.text) == (FAIL, True)


def test_a_data_folder_without_shards_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (finding,) = storage.check_reading(str(tmp_path))
    assert (finding.state, "no shards" in finding.text) == (SKIP, True)
    (finding,) = storage.check_reading("s3://bucket/set")
    assert (finding.state, "is remote" in finding.text) == (SKIP, True)


def test_a_run_folder_that_another_node_does_not_see_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, faults = storage.write_mark(tmp_path / "run")
    assert mark is not None
    assert faults == []
    assert storage.check_mark(mark)[0].state == OK
    mark.unlink()
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    clock = iter(range(100))
    monkeypatch.setattr(storage.time, "monotonic", lambda: next(clock))
    assert storage.check_mark(mark)[0].state == FAIL


@pytest.mark.parametrize(
    ("change", "states"),
    [
        ({}, {"collectives": OK, "clock": OK}),
        ({"all_reduce_gib_s": 0.01}, {"collectives": WARN, "clock": OK}),
        ({"clock_skew_s": 2.0}, {"collectives": OK, "clock": WARN}),
        ({"clock_skew_s": 2.0, "clock_jitter_s": 1.9}, {"collectives": OK, "clock": OK}),
    ],
)
def test_slow_networks_and_clocks_that_differ_are_told(change: dict, states: dict) -> None:
    assert read_states(describe_collectives({**MEASURED, **change}, "on 2 nodes")) == states


def test_a_group_that_does_not_come_together_is_a_failure() -> None:
    (finding,) = run_check("collectives", lambda: check_local_collectives(timeout_s=0.01), 60)
    assert (finding.state, "no result within" in finding.text) == (FAIL, True)


def test_data_that_is_damaged_fails_the_first_batch(tmp_path: Path, prepared: Path) -> None:
    config = build_config(write_config(tmp_path, tmp_path / "nothing"))
    (finding,) = check_first_batch(config, timeout_s=100)
    assert (finding.state, "is no prepared data set" in finding.text) == (FAIL, True)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h1"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h1"}, (3, 4, 1, "env://")),
        (
            {
                "SLURM_STEP_NODELIST": "h[2-3]",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "0",
                "SLURM_JOB_ID": "12345",
            },
            (1, 2, 0, "tcp://h2:22345"),
        ),
        ({"SLURM_STEP_NODELIST": "h1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)
def test_torchrun_and_srun_are_told_from_a_process_alone(environ: dict, found: tuple | None) -> None:
    assert read_launcher(environ) == found


@pytest.mark.multiprocess
def test_under_torchrun_a_run_folder_that_cannot_be_written_is_a_finding() -> None:
    code, out, err = run_place("doctor", "--json", "run.dir=/proc/run", processes=2)
    assert code == 1, out + err
    states = read_states([Finding(**item) for item in json.loads(out)])
    assert (states["collectives"], states["shared folder"]) == (OK, FAIL)


@pytest.mark.multiprocess
def test_under_torchrun_all_ranks_measure_and_one_speaks(tmp_path: Path) -> None:
    code, out, err = run_place("doctor", "--json", f"run.dir={tmp_path / 'run'}", processes=2)
    assert code == 0, out + err
    states = read_states([Finding(**item) for item in json.loads(out)])
    assert (states["collectives"], states["shared folder"], states["clock"]) == (OK, OK, OK)


@pytest.mark.standing
@pytest.mark.timeout(300)
def test_a_standing_cluster_is_looked_over_from_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_head(num_cpus=2) as head:
        for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(key, head.environ[key])
        look: Callable[[], int] = lambda: cli.main(  # noqa: E731
            ["doctor", "--json", "--timeout", "60", "--address", head.address, f"run.dir={tmp_path / 'run'}"]
        )
        assert look() == 0
        findings = {item["check"]: Finding(**item) for item in json.loads(capsys.readouterr().out)}
        assert findings["ray head"].text.endswith("asks for a token, which is right")
        assert findings["job stop"].state == WARN, "the head was started without it"
        assert f"{STOP_WAIT}=120" in findings["job stop"].advice
        assert findings["usage stats"].state == OK, "the head was started with --disable-usage-stats"
        assert findings["collectives"].state == findings["shared folder"].state == findings["software"].state == OK
        assert findings["software"].hosts == [socket.gethostname()]
        assert findings["topology"].text.startswith("1 node by ray: 1 x (2 cores")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert look() == 1
        findings = {item["check"]: Finding(**item) for item in json.loads(capsys.readouterr().out)}
        assert (findings["ray head"].state, "not the cluster's" in findings["ray head"].text) == (FAIL, True)
