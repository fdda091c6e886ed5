"""What a standing Ray cluster asks of a run: the right token, and paths that every node sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from place.config import Config, UsageError

# Set by Ray's job supervisor in the environment of what `ray job submit` runs.
JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Ray waits 20 s for an address that does not answer, and prints a warning each second.
ANSWER_TIMEOUT_S = 5.0


class Token(NamedTuple):
    """Ray's token, empty where there is none, and where it was looked for."""

    value: str
    source: str


def read_token(environ: Mapping[str, str]) -> Token:
    """The token Ray would send, found as Ray finds it. Raises UsageError for a token file that cannot be read."""
    if environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return Token("", "RAY_AUTH_MODE=disabled")
    if environ.get("RAY_AUTH_TOKEN"):
        return Token(environ["RAY_AUTH_TOKEN"].strip(), "RAY_AUTH_TOKEN")
    given = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path(environ.get("HOME", "/")) / ".ray" / "auth_token"
    try:
        return Token(path.read_text().strip(), str(path))
    except OSError as error:
        if given:
            raise UsageError(f"RAY_AUTH_TOKEN_PATH={given}: {error.strerror}; give the cluster's token file") from None
        return Token("", f"RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, {path}")


def names_head(address: str) -> bool:
    """Whether an address is a head's HOST:PORT; other forms, such as `auto`, are left to Ray."""
    return "://" not in address and ":" in address


def check_address(address: str, environ: Mapping[str, str]) -> bool:
    """Ask a Ray head who it is, before Ray does so for 20 s.

    Args:
        address: of the head; what `names_head` does not take is not asked.
    Returns:
        Whether the head asks for a token.
    Raises:
        UsageError: nothing answers there, or the token is missing or wrong.
    """
    import grpc

    if not names_head(address):
        return False
    token = read_token(environ)
    failure, asks_for_token = _ask(address, ""), False
    if failure == grpc.StatusCode.UNAUTHENTICATED:
        failure, asks_for_token = _ask(address, token.value), True
    if failure == grpc.StatusCode.UNAUTHENTICATED:
        said = f"the token of {token.source} is not the cluster's" if token.value else f"no token in {token.source}"
        raise UsageError(
            f"Ray at {address} asks for a token: {said}; copy the head's token file and set RAY_AUTH_TOKEN_PATH"
        )
    if failure is not None:
        raise UsageError(
            f"no Ray head answers at {address} ({failure.name.lower()}); check RAY_ADDRESS and that the head runs"
        )
    return asks_for_token


def check_standing(config: Config, environ: Mapping[str, str]) -> None:
    """Check what a run on a standing cluster needs, before anything is written.

    Raises:
        UsageError: see `check_address`; or run.dir or data.path is relative under `ray job submit`.
    """
    if environ.get("RAY_ADDRESS"):
        check_address(environ["RAY_ADDRESS"], environ)
    if JOB_MARK not in environ:
        return
    paths = [("data.path", stream.path) for stream in config.data.list_streams()]
    for key, value in [("run.dir", config.run.dir), *paths]:
        if not Path(value).is_absolute() and "://" not in value:
            raise UsageError(
                f"{key}={value} is relative, and a Ray job runs in a copy of the working directory that Ray deletes; "
                "give an absolute path that every node sees"
            )


def _ask(address: str, token: str) -> Any | None:
    """gRPC's status of one question to a Ray head, None when it answered."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=ANSWER_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return None
