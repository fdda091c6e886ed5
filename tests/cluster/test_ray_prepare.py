"""`place prepare` over Ray: the bytes of one process, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from place.cluster.prepare import map_over_ray
from training.runs import ENVIRONMENT

from place.cli import main
from place.config import PrepareConfig, RunError
from place.data.prepare import run_prepare
from place.data.storage import open_store

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of two nodes with a core each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "cluster"))))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()


def configure(output: Path | str, **changes) -> PrepareConfig:
    settings = {"source": "phantom", "count": 60, "size_px": 64, "rows_per_task": 5, "phantom_format": "dicom"}
    return PrepareConfig(**{**settings, "num_workers": 1, "output": str(output), **changes})


def read_set(output: Path | str) -> dict[str, bytes]:
    """All files of a data set, in a folder or a bucket; the cards without the time they were made at."""
    store = open_store(output)
    names = store.list_files("") + [
        f"{split}/{name}" for split in ("train", "val", "test") for name in store.list_files(split)
    ]
    files = {name: store.read(name) for name in names}
    created = json.loads(files["card.json"])["created"].encode()
    return {name: data.replace(created, b"") for name, data in files.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the phantoms, without Ray."""
    config = configure(tmp_path_factory.mktemp("alone") / "out")
    run_prepare(config)
    return read_set(config.output)


def test_two_nodes_of_a_cluster_give_the_bytes_of_one_process(address, alone, tmp_path):
    config, nodes = configure(tmp_path / "out", num_workers=0), set()

    def spread(function, tasks, num_workers):
        for node, result in map_over_ray(_note_node, ((function, task) for task in tasks), num_workers, address):
            nodes.add(node)
            yield result

    run_prepare(config, map_tasks=spread)
    assert read_set(config.output) == alone
    assert len(nodes) == 2


def _note_node(job):
    import ray

    function, task = job
    return ray.get_runtime_context().get_node_id(), function(task)


def test_workers_of_a_cluster_write_to_a_bucket(address, alone, bucket):
    config = configure(f"{bucket}/set", num_workers=2)
    run_prepare(config, map_tasks=lambda *a: map_over_ray(*a, address=address))
    assert read_set(config.output) == alone


def test_a_job_is_tried_again_when_its_worker_is_killed(address, tmp_path):
    jobs = [(str(tmp_path / "died"), number) for number in range(4)]
    assert sorted(map_over_ray(_die_once, jobs, 2, address)) == [0, 1, 2, 3]
    assert (tmp_path / "died").exists()


def _die_once(job):
    flag, number = job
    if number == 2 and not os.path.exists(flag):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_job_that_kills_every_worker_is_one_clear_line(address):
    with pytest.raises(RunError, match=r"workers died 4 times over one task .* run the same command again") as error:
        list(map_over_ray(_die, [1], 1, address))
    assert "\n" not in str(error.value)


def test_a_function_that_workers_do_not_have_is_one_clear_line(address, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def work(job):\n    return job\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    with pytest.raises(RunError, match=r"a worker cannot begin .*only_here.*; every host needs the same PLACE"):
        list(map_over_ray(only_here.work, [1], 1, address))


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_job_raises_arrives_as_it_was(address):
    with pytest.raises(RunError) as error:
        list(map_over_ray(_refuse, [1], 1, address))
    assert str(error.value) == "no such luck"


def _refuse(_):
    raise RunError("no such luck")


def test_no_more_jobs_are_read_than_are_under_way(address):
    read = []

    def jobs():
        for number in range(8):
            read.append(number)
            yield number

    done = 0
    for done, _ in enumerate(map_over_ray(abs, jobs(), 2, address), start=1):
        assert len(read) <= done + 1
    assert (done, read) == (8, [*range(8)])


def test_an_output_that_a_host_does_not_see_is_one_clear_line(address, tmp_path):
    config = configure(tmp_path / "out")

    def elsewhere(function, tasks, num_workers):
        moved = (task._replace(output="/on/the/head/alone") for task in tasks)
        return map_over_ray(function, moved, num_workers, address)

    with pytest.raises(RunError, match="workers on other hosts need an output that all of them see"):
        run_prepare(config, map_tasks=elsewhere)


def test_no_ray_at_an_address_is_wrong_use(tmp_path, monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", _find_nothing)
    command = ["prepare", "--source", "phantom", "--count", "4", "--output", str(tmp_path / "out")]
    assert main([*command, "--address", "10.0.0.1:6379"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("place prepare: no Ray at 10.0.0.1:6379 (nobody there); give the --address of a running")


def _find_nothing(**_):
    raise ConnectionError("nobody there\nand more")


def test_a_driver_that_is_killed_is_continued_without_redoing_finished_parts(alone, tmp_path):
    config = configure(tmp_path / "out", num_workers=2)
    # Workers must not take up another copy of the package that lies where the run is started.
    (tmp_path / "here" / "place").mkdir(parents=True)
    (tmp_path / "here" / "place" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    process = _start_prepare(config, tmp_path / "here")
    parts = Path(config.output) / ".parts"
    deadline = time.monotonic() + 200
    while len(list(parts.glob("0*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if child.name().startswith("ray::_run")]
    assert workers
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == [], "workers outlived the run that started them"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("0*.json")}
    assert 3 <= len(finished) < 12
    redone = []

    def spy(function, tasks, num_workers):
        redone.extend(tasks)
        yield from map(function, redone)

    run_prepare(config, map_tasks=spy)
    assert len(redone) == 12 - len(finished)
    assert read_set(config.output) == alone


def _start_prepare(config: PrepareConfig, cwd: Path) -> subprocess.Popen:
    numbers = ("count", "size_px", "rows_per_task", "num_workers", "phantom_format", "source", "output")
    options = [word for name in numbers for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    script = "import sys; from place.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script, "prepare", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )
