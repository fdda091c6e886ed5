"""Which rank the others wait for."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clock import Clock

from place.losses.objective import Losses
from place.runlog import RunLog, read_jsonl
from place.training import meter as meter_module
from place.training.meter import Meter, _count_sent_bytes, describe_lag
from place.training.phases import Phases

HOSTS = ["a", "a", "b", "b"]


def test_the_rank_that_comes_last_by_much_is_named_with_its_host() -> None:
    assert describe_lag([0.1, 0.11, 0.5, 0.1], 0.6, HOSTS) == {"lag_s": 0.4, "straggler": "rank 2 on b"}


def test_a_lag_that_costs_little_is_a_number_and_no_straggler() -> None:
    assert describe_lag([0.30, 0.31, 0.36, 0.30], 1.0, HOSTS) == {"lag_s": 0.06}
    assert describe_lag([0.01, 0.01, 0.04, 0.01], 0.05, HOSTS) == {"lag_s": 0.03}


def test_of_two_ranks_the_slower_one_is_measured_against_the_faster() -> None:
    assert describe_lag([0.1, 0.4], 0.5, ["a", "b"]) == {"lag_s": 0.3, "straggler": "rank 1 on b"}


def test_a_rank_alone_has_nobody_to_wait_for() -> None:
    assert describe_lag([0.1], 0.2, ["a"]) == {}


def test_bytes_on_the_wire_hold_what_verbs_send_past_the_kernel_and_ip_over_infiniband_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {"lo": 7, "eth0": 1000, "ib0": 500}
    cards = {name: SimpleNamespace(bytes_sent=count) for name, count in sent.items()}
    monkeypatch.setattr(meter_module.psutil, "net_io_counters", lambda pernic: cards)
    for name, number in {"lo": 772, "eth0": 1, "ib0": 32}.items():
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "type").write_text(f"{number}\n")
    assert _count_sent_bytes(tmp_path) == 1500, "no counter of InfiniBand can be read here"
    ports = {"mlx5_0/ports/1": "300\n", "mlx5_1/ports/1": "20\n", "mlx5_1/ports/2": "N/A (no PMA)\n"}
    for port, words in ports.items():
        counters = tmp_path / "infiniband" / port / "counters"
        counters.mkdir(parents=True)
        (counters / "port_xmit_data").write_text(words)
    assert _count_sent_bytes(tmp_path) == 1000 + 4 * 320
    # Two cards under a bond with a VLAN on it.
    cards |= {name: SimpleNamespace(bytes_sent=count) for name, count in {"eth1": 20, "bond0": 1020, "v7": 9}.items()}
    for name in ("eth0", "eth1", "ib0"):
        (tmp_path / "net" / name / "device").mkdir(parents=True)
    assert _count_sent_bytes(tmp_path) == 1020 + 4 * 320
    for counters in tmp_path.glob("infiniband/*/ports/*/counters/port_xmit_data"):
        counters.unlink()
    assert _count_sent_bytes(tmp_path) == 1020 + 500


def test_phases_sum_to_the_step_and_what_passes_between_epochs_counts_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a line costs is in the step; validation and the checkpoint at the end of an epoch are in none."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    device, plain = torch.device("cpu"), meter_module.gather
    monkeypatch.setattr(meter_module, "gather", lambda tensor: clock.sleep(0.03) or plain(tensor))
    log = RunLog(tmp_path, 0)
    meter = Meter(log, SimpleNamespace(global_batch=8), device, SimpleNamespace(take_times=dict), Phases(device))
    clock.sleep(0.5)
    meter.restart()
    batches = (SimpleNamespace(sample_id_B=torch.tensor([number])) for number in range(3))
    for step, batch in enumerate(meter.time_waits(batches), start=1):
        clock.sleep(0.05)
        meter.mark("forward")
        meter.count(step, 0, batch)
        meter.write(step, 0, Losses(*torch.arange(5.0)), torch.tensor([4.0, 8.0]), 1e-3, torch.tensor(1.0))
    log.close()
    records = list(read_jsonl(tmp_path / "metrics.jsonl"))
    # Forward and one gather of samples; then also the three gathers of the line before.
    assert [sum(record["phase_s"].values()) for record in records] == pytest.approx([0.08, 0.17, 0.17])
    for record in records:
        assert sum(record["phase_s"].values()) == pytest.approx(8 / record["samples_per_s"], rel=0.01)
        assert sum(record["phase_s"].values()) < 0.4
        assert (record["temperature_instance"], record["temperature_pathology"]) == (0.25, 0.125)
        assert [record[name] for name in Losses._fields] == [0, 1, 2, 3, 4]
