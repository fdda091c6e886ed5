"""What the screen of a run says, by the lines a run writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from place.config import Config
from place.screen import RunScreen


def test_a_straggler_is_named_in_the_log_even_between_two_due_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"attempt": 0, "epoch": 0, "total": 1.0, "instance": 0.5, "pathology": 0.4, "correlation": 0.1}
    rows: list[dict[str, Any]] = [
        {**row, "step": step, "samples_per_s": 9.0, "data_wait_share": 0.0, "lag_s": 0.01} for step in range(1, 7)
    ]
    for late in rows[2:4]:
        late.update(lag_s=0.25, straggler="rank 1 on node-with-a-long-name.cluster.internal")
    config = Config.model_validate({"run": {"dir": str(tmp_path)}, "data": {"path": "unused"}})
    plan = SimpleNamespace(
        world=2, num_samples=8, total_steps=100, global_batch=4, epochs=1, peak_lr=0.1, dropped_per_epoch=0, val_steps=1
    )
    with RunScreen(config, plan):  # type: ignore[arg-type]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        time.sleep(1.2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0].split()[1] for line in lines] == ["1", "3"]
    assert lines[1].endswith("rank 1 on node-with-a-long-name.cluster.internal is 0.25 s late each step")
