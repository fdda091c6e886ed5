"""Power and utilisation of GPUs: through the real pynvml, from a library that counts as the driver's does."""

from __future__ import annotations

import ctypes
import math
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training.runs import write_config

from place import cli
from place.runlog import read_jsonl
from place.training.gpu import GpuMeter, GpuState, open_gpu
from place.training.meter import describe_gpus

# What the driver exports, as far as it is called: a GPU that takes 250 W and is busy 83 % of the time.
DRIVER = r"""
#include <string.h>
#include <time.h>
static double counted_at;
double when(void) { return counted_at; }
static int device;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  if (strcmp(uuid, "GPU-1234") && strcmp(uuid, "GPU-old")) return 6; /* not found */
  device = strcmp(uuid, "GPU-old") == 0;
  *handle = &device;
  return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
  if (device) return 3; /* not supported */
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  counted_at = now.tv_sec + 1e-9 * now.tv_nsec;
  *millijoules = 5000000 + (unsigned long long)(1000 * 250 * counted_at);
  return 0;
}
typedef struct { unsigned gpu, memory; } rates;
int nvmlDeviceGetUtilizationRates(void *handle, rates *found) { found->gpu = 83; found->memory = 12; return 0; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Loaded under the driver's name, so that pynvml finds it."""
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(DRIVER)
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(library), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.when.restype = ctypes.c_double
    return loaded


@pytest.fixture(autouse=True)
def clock(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading is of the moment at which the driver counted, however busy the machine is."""
    monkeypatch.setattr("place.training.gpu.time", SimpleNamespace(monotonic=driver.when))


def test_power_is_the_energy_since_the_last_look(driver: ctypes.CDLL) -> None:
    meter = GpuMeter("GPU-1234")
    for _ in range(2):
        time.sleep(0.05)
        state = meter.take()
        assert state.power_w == pytest.approx(250, rel=0.01)
        assert state.utilisation == 83


@pytest.mark.parametrize(("uuid", "said"), [("old", "Not Supported"), ("nowhere", "Not Found")])
def test_a_gpu_that_cannot_be_read_is_one_line(
    driver: ctypes.CDLL, uuid: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        pass

    Properties.uuid = uuid
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    meter, why = open_gpu(torch.device("cuda"))
    assert meter is None
    assert said in why
    assert "power and utilisation of the GPUs are not read" in why


def test_a_cpu_has_none_and_says_nothing() -> None:
    assert open_gpu(torch.device("cpu")) == (None, "")


def test_power_is_summed_and_left_out_where_one_is_not_known() -> None:
    states = [GpuState(300.04, 90.0), GpuState(100.0, 70.0)]
    assert describe_gpus(states) == {"gpu_power_w": 400.0, "gpu_utilisation": 80.0}
    assert describe_gpus([*states, GpuState(math.nan, math.nan)]) == {}


def test_a_run_writes_what_its_gpus_took(
    driver: ctypes.CDLL, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("place.training.pretrain.open_gpu", lambda _: (GpuMeter("GPU-1234"), "as it was told"))
    settings: dict[str, Any] = {"train": {"max_steps": 3}, "run": {"log_every_steps": 1}}
    config = str(write_config(tmp_path, prepared, cluster={"launcher": "local"}, **settings))
    assert cli.main(["pretrain", "--config", config]) == 0
    run = tmp_path / "run"
    steps = [record for record in read_jsonl(run / "metrics.jsonl") if "total" in record]
    assert [record["gpu_utilisation"] for record in steps] == [83.0] * 3
    assert [record["gpu_power_w"] for record in steps] == pytest.approx([250.0] * 3, rel=0.01)
    notes = [note for record in read_jsonl(run / "attempts.jsonl") for note in record.get("notes", [])]
    assert "as it was told" in notes
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "GPU power of all workers over steps" in page
    assert "GPU utilisation, mean of the workers over steps" in page
