"""The files beside `ray job submit` and KubeRay: what travels to the cluster, and a manifest its schema accepts."""

from __future__ import annotations

import copy
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from place.config import build_config

ROOT = Path(__file__).parents[2]
RUNTIME_ENV = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
MANIFEST = yaml.safe_load((ROOT / "cluster" / "kuberay.yaml").read_text())
SCHEMA = yaml.safe_load((Path(__file__).parent / "rayjob.schema.yaml").read_text())
KUBERNETES = "1.31"


def read_pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template of a RayJob as the Pod that Kubernetes would be given."""
    cluster = manifest["spec"]["rayClusterSpec"]
    for number, group in enumerate([cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]):
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod{number}"}, **group["template"]}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise what the Kubernetes API server would refuse."""
    jsonschema.validate(manifest, SCHEMA, cls=jsonschema.Draft202012Validator)
    for pod in read_pods(manifest):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def set_at(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def test_the_kuberay_manifest_fits_its_schema() -> None:
    check_manifest(MANIFEST)


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
CONTAINER = (*HEAD, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "place"),
        (("spec", "submissionMode"), "HttpMode"),
        (("spec", "shutdownAfterJobFinishes"), False),
        ((*HEAD, "rayStartParams", "num-cpus"), 0),
        ((*HEAD, "rayStartParam"), {}),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "on"),
        ((*CONTAINER, "volumeMount"), []),
        ((*CONTAINER, "env", 0, "value"), 120),
        ((*CONTAINER, "ports", 0, "containerPort"), "6379"),
    ],
)
def test_a_slip_in_the_manifest_is_found(path: tuple[str | int, ...], value: Any) -> None:
    manifest = copy.deepcopy(MANIFEST)
    set_at(manifest, path, value)
    with pytest.raises(jsonschema.ValidationError):
        check_manifest(manifest)


def test_the_manifest_runs_a_command_that_fits_the_cluster_it_asks_for() -> None:
    program, verb, flag, path, *overrides = MANIFEST["spec"]["entrypoint"].split()
    assert (program, verb, flag) == ("place", "pretrain", "--config")
    config = build_config(ROOT / path.removeprefix("/opt/place/"), overrides)
    (group,) = MANIFEST["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]
    gpus = int(limits["limits"]["nvidia.com/gpu"])
    assert config.cluster.num_workers == group["replicas"] * gpus
    assert config.cluster.cpus_per_worker * gpus <= int(limits["requests"]["cpu"])
    assert Path(config.run.dir).is_absolute()
    assert Path(config.data.path).is_absolute()


def test_the_manifest_runs_the_ray_that_is_pinned_and_gives_a_stopped_job_time_for_a_checkpoint() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={MANIFEST['spec']['rayClusterSpec']['rayVersion']}" in pins
    wait = RUNTIME_ENV["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert yaml.safe_load(MANIFEST["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == wait
    assert all(pod["spec"]["terminationGracePeriodSeconds"] > int(wait) for pod in read_pods(MANIFEST))


def test_ray_accepts_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**RUNTIME_ENV)


def test_the_package_of_a_job_holds_the_code_and_stays_below_two_mebibytes(tmp_path: Path) -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    excludes = ray_constants.get_runtime_env_default_excludes() + RUNTIME_ENV["excludes"]
    create_package(str(ROOT), tmp_path / "job.zip", True, excludes=excludes, logger=logging.getLogger("package"))
    names = zipfile.ZipFile(tmp_path / "job.zip").namelist()
    assert {"place/cli.py", "cluster/launch.py", "kernels/attention/__init__.py", "configs/demo.yaml"} <= set(names)
    assert [name for name in names if name.split("/")[0] in ("tests", ".git", ".venv", "runs", "datasets")] == []
    assert (tmp_path / "job.zip").stat().st_size < 2 << 20
