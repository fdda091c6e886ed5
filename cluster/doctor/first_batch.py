"""Time to the first batch of a run, and the rate of the next ones: the loader alone, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from place.cluster.doctor.findings import FAIL, OK, WARN, Finding
from place.cluster.doctor.network import start_module

from place.config import Config, RunError, UsageError, check_config

BATCHES = 4
# A tokenizer that a run would train from all reports is trained from so many here.
REPORTS = 200
# Where the loader's process notes the names of its shared memory.
PREFIX = "prefix"


def check_first_batch(config: Config, timeout_s: float) -> list[Finding]:
    """One worker's loader as `place pretrain` would build it, without a model."""
    with tempfile.TemporaryDirectory(prefix="place-doctor-") as cache:
        process = start_module("place.cluster.doctor.first_batch", {"config": config.model_dump(), "cache": cache})
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            advice = "look at the storage lines above; more data.num_workers, or data.cache_dir on a local disk"
            return [Finding("first batch", FAIL, f"no batch within {timeout_s:.0f} s", advice)]
        finally:
            process.kill()
            process.communicate()
            _remove_segments(Path(cache) / PREFIX)
    if process.returncode:
        return [Finding("first batch", FAIL, err.strip().splitlines()[-1] if err.strip() else "the loader died")]
    found = json.loads(out.splitlines()[-1])
    text = (
        f"{found['first_s']:.1f} s to the first batch of {found['local_batch']} pairs, then {found['rate']:,.0f} "
        f"pairs/s a worker ({config.data.num_workers} loader processes)"
    )
    if found["first_s"] > 60:
        return [Finding("first batch", WARN, text, "look at the storage lines above, and at data.num_workers")]
    return [Finding("first batch", OK, text)]


def measure_first_batch(config: Config, cache: Path) -> dict[str, Any]:
    """Seconds to the first training batch from nothing, and pairs a second of the next ones."""
    from place.data.loader import PairLoader
    from place.data.mixture import count_epoch, read_training_samples
    from place.data.streaming import select_sentences
    from place.data.tokens import ReportTokenizer, train_tokenizer

    data, text = config.data, config.model.text
    if text.source == "scratch":
        samples = islice(read_training_samples(data), REPORTS)
        sentences = (said for sample in samples for said in select_sentences(sample["sentences"], data.sections))
        tokenizer = train_tokenizer(sentences, text.vocab_size, data.max_tokens, data.max_sentences)
    else:
        tokenizer = ReportTokenizer.load(text.source, data.max_tokens, data.max_sentences)
    local_batch = max(1, config.train.global_batch // config.cluster.num_workers)
    steps = min(BATCHES, count_epoch(data, data.train_split, train=True) // local_batch)
    if not steps:
        raise UsageError(f"a worker's share of {local_batch} pairs is larger than split '{data.train_split}'")
    began = time.perf_counter()
    # No model looks at the patches.
    sizes = {"local_batch": local_batch, "num_patches": 1}
    loader = PairLoader(data, data.train_split, tokenizer, seed=config.run.seed, train=True, cache=cache, **sizes)
    (cache / PREFIX).write_text(loader.shm_prefix)
    batches = loader.read_epoch(0, 0, steps, 1)
    next(batches)
    first_s = time.perf_counter() - began
    rest = sum(len(batch.sample_id_B) for batch in batches)
    took_s = time.perf_counter() - began - first_s
    return {"first_s": first_s, "local_batch": local_batch, "rate": rest / took_s if rest else local_batch / first_s}


def _remove_segments(note: Path) -> None:
    """Shared memory and locks of the loader, which a killed process leaves and an ended one leaves in part."""
    if note.is_file():
        prefix = note.read_text()
        for path in [*Path("/dev/shm").glob(f"{prefix}*"), *Path(tempfile.gettempdir()).glob(f"{prefix}*_filelock")]:
            path.unlink(missing_ok=True)


def main(setup: dict[str, Any]) -> int:
    """As a program: one line of JSON, or one line of what is wrong."""
    try:
        found = measure_first_batch(check_config(setup["config"]), Path(setup["cache"]))
    except (UsageError, RunError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
