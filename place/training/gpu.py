"""What a GPU did since the last look, as NVIDIA's management library (NVML) counts it."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch


class GpuState(NamedTuple):
    """Mean power in W since the last look, and share in % of NVML's last sampling period that a kernel ran."""

    power_w: float
    utilisation: float


class GpuMeter:
    """Reads one GPU. Final; reading does not wait for the device."""

    def __init__(self, uuid: str):
        """Open the GPU of a UUID as NVML writes it. Raises pynvml.NVMLError: no driver, or it does not count energy."""
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._energy_j, self._when = self._read_energy_j(), time.monotonic()
        # What cannot be read is known now, not at the first line of the log.
        self.take()

    def take(self) -> GpuState:
        """What passed since the last call, or since this was made."""
        energy_j, when = self._read_energy_j(), time.monotonic()
        power_w = (energy_j - self._energy_j) / max(when - self._when, 1e-6)
        self._energy_j, self._when = energy_j, when
        return GpuState(power_w, float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))

    def _read_energy_j(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000


def open_gpu(device: torch.device) -> tuple[GpuMeter | None, str]:
    """The meter of a device, or why there is none: not a GPU of NVIDIA, a slice of one, or one older than Volta.

    Returns: the meter and an empty reason; on a CPU neither.
    """
    if device.type != "cuda":
        return None, ""
    import pynvml

    try:
        return GpuMeter(f"GPU-{torch.cuda.get_device_properties(device).uuid}"), ""
    except (pynvml.NVMLError, AttributeError) as error:
        return None, f"power and utilisation of the GPUs are not read: NVML says '{error}'"
