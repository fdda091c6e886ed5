"""A prepared data set on S3: the same bytes as in a folder, continued after a kill, checked when read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from small_sets import write_csv_source

from place.config import PrepareConfig, UsageError
from place.data.prepare import run_prepare
from place.data.prepared import list_splits, read_card, read_samples
from place.data.storage import Bucket, open_store
from place.data.verify import find_faults

BREAK_OFF = """
import gc, sys
from place.data.storage import open_store

def break_off():
    with open_store(sys.argv[1]).create("table.parquet") as stream:
        stream.write(bytes(int(sys.argv[2])))
        raise OSError("the source cannot be read")

try:
    break_off()
except OSError as error:
    print(error)
gc.collect()
"""


def list_objects(bucket: str) -> dict[str, bytes]:
    """All objects of a bucket but the empty ones that stand for folders."""
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    name = bucket.removeprefix("s3://")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name)
    keys = [item["Key"] for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]
    return {key: client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys}


def drop_stamp(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the time at which the cards were made."""
    created = json.loads(files["card.json"])["created"].encode()
    return {name: data.replace(created, b"") for name, data in files.items()}


def prepare_both(tmp_path: Path, bucket: str) -> tuple[PrepareConfig, PrepareConfig]:
    """The same set for a folder, which is prepared, and for a bucket, which is not yet."""
    local = write_csv_source(tmp_path)
    run_prepare(local)
    return local, local.model_copy(update={"output": f"{bucket}/sets/mine"})


def read_folder(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def read_bucket(config: PrepareConfig, bucket: str) -> dict[str, bytes]:
    return {key.removeprefix("sets/mine/"): data for key, data in list_objects(bucket).items()}


def test_a_bucket_gets_the_bytes_that_a_folder_gets(tmp_path, bucket):
    local, remote = prepare_both(tmp_path, bucket)
    card = run_prepare(remote)
    assert drop_stamp(read_bucket(remote, bucket)) == drop_stamp(read_folder(local.output))
    assert run_prepare(remote) == {**card, "already_prepared": True}
    assert read_card(remote.output) == card
    assert list_splits(remote.output) == list_splits(local.output)
    assert list(read_samples(remote.output, "train")) == list(read_samples(local.output, "train"))


def test_a_run_that_was_killed_goes_on_from_its_parts_in_the_bucket(tmp_path, bucket):
    local, remote = prepare_both(tmp_path, bucket)
    whole = drop_stamp(read_folder(local.output))
    for kill_at in (2, 5, 9, 14):
        config = remote.model_copy(update={"output": f"{bucket}/{kill_at}"})
        assert _prepare_until(config, kill_at) == signal.SIGKILL
        found = {key.removeprefix(f"{kill_at}/"): data for key, data in list_objects(bucket).items()}
        finished = [name for name in found if name.startswith(".parts/0") and name.endswith(".json")]
        assert "card.json" not in found
        redone = []

        def spy(function, tasks, num_workers, redone=redone):
            redone.extend(tasks)
            yield from map(function, redone)

        run_prepare(config, map_tasks=spy)
        assert len(redone) == 3 - len(finished)
        found = {
            key.removeprefix(f"{kill_at}/"): data
            for key, data in list_objects(bucket).items()
            if key.startswith(f"{kill_at}/")
        }
        assert drop_stamp(found) == whole, f"killed at write {kill_at}"


def _prepare_until(config: PrepareConfig, kill_at: int) -> int:
    """Prepare in a forked process that is killed at its n-th write. Returns the signal it ended by."""
    child = os.fork()
    if child == 0:
        writes, create = [], Bucket.create

        def counted(self, name):
            writes.append(name)
            if len(writes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return create(self, name)

        Bucket.create = counted
        run_prepare(config)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("size", [1000, 6 << 20])
def test_an_upload_that_breaks_off_leaves_the_old_object_and_no_other(bucket, size):
    open_store(f"{bucket}/mine").write("table.parquet", b"the whole of it")
    # In a process of its own: what a collected stream does would wait for a server in this one.
    done = subprocess.run(
        [sys.executable, "-c", BREAK_OFF, f"{bucket}/mine", str(size)], capture_output=True, text=True
    )
    assert done.stdout == "the source cannot be read\n"
    assert list_objects(bucket) == {"mine/table.parquet": b"the whole of it"}


def test_other_settings_for_the_same_place_in_a_bucket_are_named(tmp_path, bucket):
    _, remote = prepare_both(tmp_path, bucket)
    run_prepare(remote)
    with pytest.raises(UsageError, match="prepared with other settings: size_px=48, not 32"):
        run_prepare(remote.model_copy(update={"size_px": 32}))
    with pytest.raises(UsageError, match=r"holds other files \(mine\)"):
        run_prepare(remote.model_copy(update={"output": f"{bucket}/sets"}))


def test_a_bucket_that_is_not_there_is_one_clear_line(tmp_path, bucket):
    config = write_csv_source(tmp_path, output="s3://no-such-bucket-of-ours/x")
    with pytest.raises(UsageError, match=r"cannot write to s3://no-such-bucket-of-ours/x: .*NO_SUCH_BUCKET"):
        run_prepare(config)


@pytest.mark.parametrize(("where", "words"), [("s3:///x", "no bucket in it"), ("gs://x/y", "unknown kind of storage")])
def test_an_address_that_is_none_of_ours_is_wrong_use(where, words):
    with pytest.raises(UsageError, match=words):
        open_store(where)


def test_a_damaged_shard_in_a_bucket_is_named(tmp_path, bucket):
    _, remote = prepare_both(tmp_path, bucket)
    run_prepare(remote)
    store = open_store(remote.output)
    name = f"train/{next(name for name in store.list_files('train') if 'shard' in name)}"
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    store.write(name, bytes(data))
    (fault,) = find_faults(remote.output)
    assert fault.startswith(f"shard {remote.output}/{name} is damaged")
    store.delete(name)
    assert list(find_faults(remote.output)) == [f"shard {remote.output}/{name} is missing"]
