"""What all tests share: one thread a process, no network, no pytest options."""

from __future__ import annotations

import logging
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from place.compat import patch_torchvision

patch_torchvision()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    # Read when Triton is imported: its kernels then run on a CPU, in an interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))

REAL_DATA = Path(os.environ.get("PLACE_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real radiographs and reports; skips where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real data: set PLACE_REAL_DATA to a folder that has it")
    return REAL_DATA


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared phantom data set; copy it before changing it."""
    from place.config import PrepareConfig
    from place.data.prepare import run_prepare

    folder = tmp_path_factory.mktemp("prepared") / "phantoms"
    run_prepare(
        PrepareConfig(source="phantom", count=300, size_px=48, num_workers=1, output=str(folder), split=(0.6, 0.3, 0.1))
    )
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a real S3 endpoint on this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """`s3://NAME` of a new bucket, with the environment that reaches it."""
    import boto3

    settings = {
        "S3_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    name = f"test-{zlib.crc32(request.node.nodeid.encode()):08x}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"
