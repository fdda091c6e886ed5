"""TensorBoard: what is done again replaces what was done before, and the checkpoint's own step stays."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from place.trackers import TensorBoard


def test_a_resume_replaces_the_steps_after_its_checkpoint_alone(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, 0)
    for step in (50, 100, 150):
        first.log(step, {"total": float(step)})
    first.log(100, {"val_total": 1.0})
    first.close()
    second = TensorBoard(tmp_path, 100)
    for step in (150, 200):
        second.log(step, {"total": -float(step)})
    second.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("total")]
    assert shown == [(50, 50.0), (100, 100.0), (150, -150.0), (200, -200.0)]
    assert [event.step for event in events.Scalars("val_total")] == [100]
