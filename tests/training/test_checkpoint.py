"""Checkpoints: whole or invisible, checked before they are read, thinned out, and loaded without what trained them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from curves import build_engine, run_steps
from tiny import build_tiny_config, merge
from torch import Tensor

from place.config import Config, RunError, UsageError, dump_config
from place.data.tokens import train_tokenizer
from place.model.place import build_model
from place.training import checkpoint, saver
from place.training.checkpoint import agree_on_checkpoint, find_checkpoint, find_fault, load_run, read_state
from place.training.engine import TorchEngine
from place.training.plan import RunPlan, build_plan
from place.training.pretrain import _resume
from place.training.saver import Saver
from place.training.state import Share

CPU = torch.device("cpu")
REPORT = ["No pneumothorax is seen."]
IMAGES = torch.linspace(-1, 1, 2 * 32 * 32).view(2, 1, 32, 32)


class StubEngine:
    """Saves three numbers; enough for folders."""

    device, layout = CPU, {"weight": ("weight", (3,))}

    def __init__(self) -> None:
        self.loaded = Path()

    def copy_share(self) -> Share:
        return Share({"weight@0": torch.ones(3)}, {"exp_avg:weight@0": torch.ones(3)}, {"optimizer_step": 1.0})

    def load(self, folder: Path, numbers: dict[str, float]) -> None:
        self.loaded = folder


def write_steps(
    run_dir: Path, steps: list[int], keep: int = 9, best: int | None = None, without: tuple[str, ...] = ()
) -> None:
    """Checkpoints of these steps, in this order; their state lacks the keys `without`."""
    writer = Saver(run_dir, StubEngine(), keep, 60)
    for step in steps:
        state = {"step": step, "best_val": None, "world": 1, "global_batch": 8, "seed": 0}
        state |= {"num_canonical_nodes": 2, "data_fingerprint": "same"}
        state |= {"shuffle_block_size": 1 << 18, "train_split": "train"}
        state = {key: value for key, value in state.items() if key not in without}
        writer.save({**state, "best_step": best if best and best <= step else None})
        writer.wait()


def list_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


def build_state(folder: Path, **sections: dict) -> tuple[Config, RunPlan]:
    """A config of a run in `folder` on data that has nothing but a card, and its plan."""
    (folder / "card.json").write_text('{"fingerprint": "same"}')
    base = {"run": {"dir": str(folder)}, "data": {"path": str(folder)}}
    config = build_tiny_config(**merge(base, sections))
    return config, build_plan(config, 1, 40, 0)


def test_a_checkpoint_is_found_with_what_was_said_of_it(tmp_path: Path) -> None:
    write_steps(tmp_path, [3, 12])
    folder, notes = find_checkpoint(tmp_path)
    assert folder is not None
    assert (folder.name, notes) == ("step_00000012", [])
    assert read_state(folder)["step"] == 12
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_an_empty_run_has_no_checkpoint_and_no_fault(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])


def test_a_partial_folder_is_never_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, [1])
    monkeypatch.setattr(saver, "publish", lambda *_: None)
    write_steps(tmp_path, [2])
    assert len(list((tmp_path / "checkpoints").glob("step_00000002.*.partial"))) == 1
    folder, notes = find_checkpoint(tmp_path)
    assert folder is not None
    assert (folder.name, notes) == ("step_00000001", [])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001"


def test_what_an_earlier_attempt_left_is_cleared_away_and_never_used(tmp_path: Path) -> None:
    for name in ("step_00000002.aaaa.partial", "step_00000001.removed"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "rubbish").touch()
    write_steps(tmp_path, [2])
    assert find_fault(tmp_path / "checkpoints" / "step_00000002") == ""
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    files = {path.name for path in (tmp_path / "checkpoints" / "step_00000002").iterdir()}
    assert files == {"model.safetensors", "optimizer_00000.safetensors", "state.json", "files.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "optimizer_00000.safetensors", "files.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "step_00000001"
    (folder / name).unlink()
    assert find_fault(folder).endswith(f"step_00000001: {'' if name == 'files.json' else 'file '}{name} is missing")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "optimizer_00000.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_file_is_named(how: str, name: str, tmp_path: Path) -> None:
    write_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "step_00000001"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content if how == "flipped" else content[:-1])
    assert find_fault(folder).endswith(f"step_00000001: file {name} is damaged")


@pytest.mark.parametrize("content", ["", '{"model.safe'])
def test_a_damaged_listing_is_named(content: str, tmp_path: Path) -> None:
    write_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "step_00000001"
    (folder / "files.json").write_text(content)
    assert find_fault(folder).endswith("file files.json is damaged")


def test_the_newest_complete_one_is_chosen_with_a_note_of_each_one_skipped(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2, 3, 4])
    (tmp_path / "checkpoints" / "step_00000004" / "state.json").unlink()
    (tmp_path / "checkpoints" / "step_00000003" / "model.safetensors").write_bytes(b"short")
    folder, notes = find_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "step_00000002"
    assert [note.split("checkpoints/")[1] for note in notes] == [
        "step_00000004: file state.json is missing",
        "step_00000003: file model.safetensors is damaged",
    ]


def test_a_run_without_a_complete_checkpoint_is_broken(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2])
    for folder in (tmp_path / "checkpoints").glob("step_*"):
        (folder / "state.json").unlink()
    with pytest.raises(RunError, match=r"step_00000002: file state.json is missing; no complete checkpoint is left"):
        find_checkpoint(tmp_path)


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2, 3, 4, 5], keep=2, best=2)
    assert list_steps(tmp_path) == [2, 4, 5]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_00000002"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005"


def test_a_skipped_newer_checkpoint_does_not_push_out_what_is_written_after_it(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 9])
    (tmp_path / "checkpoints" / "step_00000009" / "state.json").unlink()
    write_steps(tmp_path, [2, 3], keep=1)
    assert list_steps(tmp_path) == [3]
    folder, notes = find_checkpoint(tmp_path)
    assert folder is not None
    assert (folder.name, notes) == ("step_00000003", [])


def test_a_resume_starts_at_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, [2, 5])
    (tmp_path / "checkpoints" / "step_00000005" / "state.json").unlink()
    config, plan = build_state(tmp_path)
    engine = StubEngine()
    progress, notes = _resume(config, engine, plan, *agree_on_checkpoint(tmp_path))
    assert progress["step"] == 2
    assert engine.loaded.name == "step_00000002"
    assert len(notes) == 2
    assert "state.json is missing" in notes[0]
    assert notes[1] == "resumed from step_00000002"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": {"global_batch": 4}}, "global_batch=8, this run has 4"),
        ({"run": {"seed": 7}}, "seed=0, this run has 7"),
        ({"data": {"num_canonical_nodes": 4}}, "num_canonical_nodes=2, this run has 4"),
        ({"data": {"shuffle_block_size": 512}}, "shuffle_block_size=262144, this run has 512"),
        ({"data": {"train_split": "val"}}, "train_split=train, this run has val"),
    ],
)
def test_a_resume_with_other_numbers_is_wrong_use(changed: dict, said: str, tmp_path: Path) -> None:
    write_steps(tmp_path, [2])
    config, plan = build_state(tmp_path, **changed)
    engine = StubEngine()
    with pytest.raises(UsageError) as caught:
        _resume(config, engine, plan, *agree_on_checkpoint(tmp_path))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert engine.loaded == Path()


def test_a_resume_with_other_workers_says_so(tmp_path: Path) -> None:
    write_steps(tmp_path, [2])
    config, plan = build_state(tmp_path)
    found = agree_on_checkpoint(tmp_path)
    _, notes = _resume(config, StubEngine(), plan.model_copy(update={"world": 2}), *found)
    assert notes[0] == "step_00000002 was written by 1 workers, 2 go on"


def test_a_checkpoint_from_before_more_was_asked_of_it_goes_on(tmp_path: Path) -> None:
    write_steps(tmp_path, [2], without=("shuffle_block_size", "train_split"))
    config, plan = build_state(tmp_path, data={"shuffle_block_size": 512})
    progress, _ = _resume(config, StubEngine(), plan, *agree_on_checkpoint(tmp_path))
    assert progress["step"] == 2


def test_a_resume_makes_the_pointers_say_what_it_goes_on_from(tmp_path: Path) -> None:
    write_steps(tmp_path, [1, 2, 3], best=2)
    root = tmp_path / "checkpoints"
    (root / "step_00000003" / "state.json").unlink()
    (root / "best").write_text("step_00000003")
    folder, _ = agree_on_checkpoint(tmp_path)
    assert folder == root / "step_00000002"
    assert (root / "latest").read_text() == (root / "best").read_text() == "step_00000002"
    write_steps(tmp_path, [3])
    assert find_fault(root / "step_00000003") == ""


def test_a_checkpoint_without_optimiser_state_is_refused(tmp_path: Path) -> None:
    write_steps(tmp_path, [2])
    folder = tmp_path / "checkpoints" / "step_00000002"
    (folder / "optimizer_00000.safetensors").unlink()
    engine = TorchEngine(torch.nn.Linear(2, 2), build_tiny_config(), CPU)
    with pytest.raises(RunError, match="holds no optimiser state; start again in another run.dir"):
        engine.load(folder, {})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write_steps(tmp_path, [2])
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(3))
    engine = TorchEngine(model, build_tiny_config(), CPU)
    with pytest.raises(RunError, match="lacks exp_avg_sq of weight; resume with the model that wrote it"):
        engine.load(tmp_path / "checkpoints" / "step_00000002", {"optimizer_step": 1.0})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": {"joint_width": 16}}, r"has \S+ of shape \[24, 32\], this model has it of shape \[16, 32\]"),
        ({"model": {"joint_width": 32}}, r"has \S+ of shape \[24, 32\], this model has it of shape \[32, 32\]"),
        ({"model": {"observations": {"num_queries": 4}}}, r"has observe.queries of shape .* of shape \[4, 32\]"),
        ({"loss": {"tokens": {"weight": 1.0}}}, r"has no project_region\S+, this model has it of shape \["),
    ],
)
def test_a_model_of_other_shapes_is_refused_in_one_line(changed: dict, said: str, tmp_path: Path) -> None:
    refuse_resume(build_tiny_config(), build_tiny_config(**changed), said, tmp_path)


def test_a_model_that_lacks_what_was_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    with_tokens = build_tiny_config(loss={"tokens": {"weight": 1.0}})
    refuse_resume(with_tokens, build_tiny_config(), r"has project_region\S+, which this model lacks", tmp_path)


def refuse_resume(written: Config, resumed: Config, said: str, tmp_path: Path) -> None:
    writer = Saver(tmp_path, build_engine(written, 0), 5, 60)
    writer.save({"step": 1, "best_step": None})
    writer.wait()
    engine = build_engine(resumed, 0)
    before = engine.copy_share().weights
    with pytest.raises(UsageError, match=said + r".*; resume with the model and loss sections that wrote it") as caught:
        engine.load(tmp_path / "checkpoints" / "step_00000001", {"optimizer_step": 0.0})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(run, before[key]) for key, run in engine.copy_share().weights.items())


def test_parameters_that_no_loss_reaches_leave_the_count_of_steps_alone(tmp_path: Path) -> None:
    config = build_tiny_config(loss={"pathology": {"weight": 0.0}})
    engine, fresh = build_engine(config, 0), build_engine(config, 1)
    run_steps(engine, config, 0, 3)
    assert len(engine.optimizer.state) < len(engine.parameters)
    writer = Saver(tmp_path, engine, 5, 60)
    writer.save({"step": 3, "best_step": None})
    writer.wait()
    folder = tmp_path / "checkpoints" / "step_00000003"
    numbers = read_state(folder)["numbers"]
    assert numbers["optimizer_step"] == 3
    fresh.load(folder, numbers)
    assert torch.equal(run_steps(fresh, config, 3, 5), run_steps(engine, config, 3, 5))
    assert fresh.copy_share().numbers["optimizer_step"] == 5


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run folder made by hand, with checkpoints at steps 1 (the best) and 2, and what the best one's model says."""
    folder = tmp_path_factory.mktemp("made") / "run"
    config = build_tiny_config(data={"path": "gone"}, run={"dir": str(folder)})
    tokenizer = train_tokenizer(REPORT, 100, 32, 4)
    torch.manual_seed(0)
    model, _ = build_model(config, tokenizer.vocab_size, CPU)
    checkpoint.write_definition(folder, config, model, tokenizer)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(json.dumps({"mean": 0.25, "std": 0.125, "commit": "abcdef"}))
    engine = TorchEngine(model, config, CPU)
    writer = Saver(folder, engine, 5, 60)
    writer.save({"step": 1, "best_step": 1})
    with torch.no_grad():
        said = model.eval().encode_image(IMAGES)._asdict()
        model.project_image[0].weight.zero_()
    writer.save({"step": 2, "best_step": 1})
    writer.wait()
    return folder, said


def test_a_loaded_run_has_the_model_and_all_that_reads_for_it(run_dir: tuple[Path, dict[str, Tensor]]) -> None:
    folder, said = run_dir
    loaded = load_run(folder)
    assert (loaded.mean, loaded.std, loaded.step, loaded.commit) == (0.25, 0.125, 1, "abcdef")
    assert loaded.config == build_tiny_config(data={"path": "gone"}, run={"dir": str(folder)})
    assert loaded.tokenizer.hf.get_vocab() == train_tokenizer(REPORT, 100, 32, 4).hf.get_vocab()
    assert not loaded.model.training
    with torch.no_grad():
        for name, value in loaded.model.encode_image(IMAGES)._asdict().items():
            assert torch.equal(value, said[name]), name


@pytest.mark.parametrize(("which", "step"), [("best", 1), ("latest", 2), ("step_00000002", 2)])
def test_a_checkpoint_is_chosen_by_name(which: str, step: int, run_dir: tuple[Path, dict[str, Tensor]]) -> None:
    assert load_run(run_dir[0], which).step == step


def test_a_run_is_loaded_without_deepspeed_and_ray(run_dir: tuple[Path, dict[str, Tensor]]) -> None:
    code = (
        "import sys; from place.training.checkpoint import load_run; load_run(sys.argv[1]);"
        "print([name for name in ('deepspeed', 'ray', 'xformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir[0])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkpoint_that_is_not_there_is_wrong_use(run_dir: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint 'step_7'; there are \['step_00000001', 'step_00000002'\]"):
        load_run(run_dir[0], "step_7")
    with pytest.raises(UsageError, match="is no run folder"):
        load_run(tmp_path)


def test_a_broken_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    write_steps(tmp_path, [1])
    (tmp_path / "config.yaml").write_text(dump_config(build_tiny_config()))
    (tmp_path / "checkpoints" / "step_00000001" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors is missing; choose another one with --checkpoint"):
        load_run(tmp_path)
