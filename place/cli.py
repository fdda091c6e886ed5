"""The command line: one verb, one function. Only what a verb needs is imported, when it runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from place import __version__
from place.config import Config, PrepareConfig, RunError, SourceName, UsageError, build_config
from place.kept import FULL

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 85
_PAGE = "the same with curves and pictures; holds report texts"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed, 2 wrong use, 85 stopped early with a checkpoint."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return VERBS[arguments.verb](arguments)
    except UsageError as error:
        print(f"place {arguments.verb}: {error}", file=sys.stderr)
        return USAGE
    except RunError as error:
        print(f"place {arguments.verb}: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(f"place {arguments.verb}: {error.strerror}{where}; make room, the same command goes on", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"place {arguments.verb}: interrupted", file=sys.stderr)
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="place", description="Pretraining from chest radiographs and radiology reports."
    )
    parser.add_argument("--version", action="version", version=f"place {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_prepare(verbs.add_parser("prepare", help="images and reports to verified shards"))
    _add_pretrain(verbs.add_parser("pretrain", help="train a model on prepared data"))
    _add_evaluate(verbs.add_parser("evaluate", help="judge a trained model"))
    _add_compare(verbs.add_parser("compare", help="two evaluations of the same images, paired by patient"))
    _add_export(verbs.add_parser("export", help="a run as a folder that transformers and timm load"))
    _add_data(verbs.add_parser("data", help="look at, check or measure prepared data"))
    _add_runs(verbs.add_parser("runs", help="list runs and where they stand, or stop one at its next step"))
    _add_report(verbs.add_parser("report", help="one page of what a run did: curves, speed, restarts, samples"))
    _add_plan(verbs.add_parser("plan", help="memory, steps, time and traffic of a run before it costs anything"))
    _add_scale(verbs.add_parser("scale", help="measure a run at several sizes, and predict larger ones"))
    _add_doctor(verbs.add_parser("doctor", help="check this machine or cluster before the first run"))
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    fields = PrepareConfig.model_fields
    # What is not given is not there: a protocol's value comes after what was given and before a default.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--source", choices=get_args(SourceName), help=fields["source"].description)
    parser.add_argument("--protocol", metavar="FILE", help=fields["protocol"].description)
    parser.add_argument("--allow-counts", nargs="+", metavar="NAME", help=fields["allow_counts"].description)
    parser.add_argument("--output", required=True, help=fields["output"].description)
    parser.add_argument("--input", help=fields["input"].description)
    parser.add_argument("--image-root", help=fields["image_root"].description)
    parser.add_argument("--reports", help=fields["reports"].description)
    parser.add_argument(
        "--column", nargs="+", action="extend", metavar="FIELD=NAME", help=fields["columns"].description
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help=fields["label_columns"].description)
    parser.add_argument("--masks", nargs="+", metavar="FINDING=PATTERN", help=fields["masks"].description)
    parser.add_argument("--boxes", metavar="FILE", help=fields["boxes"].description)
    parser.add_argument("--only", metavar="FILE", help=fields["only"].description)
    parser.add_argument("--views", nargs="+", metavar="VIEW", help=fields["views"].description)
    parser.add_argument("--case", choices=("keep", "lower"), help=fields["case"].description)
    parser.add_argument("--split", nargs=3, type=float, metavar="SHARE", help=fields["split"].description)
    parser.add_argument("--phantom-format", choices=("jpeg", "dicom"), help=fields["phantom_format"].description)
    parser.add_argument("--launcher", choices=("ray", "local"), help=fields["launcher"].description)
    parser.add_argument("--address", metavar="HOST:PORT", help=fields["address"].description)
    numbers = ("count", "seed", "size-px", "jpeg-quality", "min-words", "num-workers", "rows-per-task", "shard-mib")
    for name, kind in (*((name, int) for name in numbers), ("salt-file", str)):
        field = fields[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=kind, help=f"{field.description} Default {field.default}.")


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of a config, for editors, and exit"
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST[:COUNT]",
        help="trace of COUNT steps (3) from step FIRST on; same as run.profile_step=FIRST run.profile_steps=COUNT",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--run", help="run folder of a `place pretrain`")
    judged.add_argument(
        "--encoder",
        metavar="SOURCE",
        help="instead of a run: timm:NAME or hf:NAME, a folder of either with safetensors, or of `place export`",
    )
    parser.add_argument("--random-weights", action="store_true", help="--encoder: a baseline that has learned nothing")
    parser.add_argument("--output", help="folder that is written; default RUN/evaluation, needed with --encoder")
    parser.add_argument("--data", required=True, help="folder written by `place prepare`")
    parser.add_argument(
        "--tasks",
        default="all",
        help="comma list of zero_shot, retrieval, classification, pixel_probe, grounding, segmentation, detection, "
        "generation; or all that the data set permits; finetune and finetune_segmentation, which train the encoder, "
        "by name only",
    )
    parser.add_argument("--split", default="test", help="split that is judged")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a folder name such as step_00000100")
    parser.add_argument("overrides", nargs="*", metavar="evaluation.key=value", help="laid over the run's config")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN_A", help="run folder, or one that `place evaluate --output` wrote")
    parser.add_argument("second", metavar="RUN_B", help="another one; shown is B - A")
    parser.add_argument("--data", help="folder of the judged data set; default the one that RUN_A was trained on")
    parser.add_argument("--tasks", default="", help="comma list; default all that were judged in both")
    parser.add_argument("--findings", action="store_true", help="print the figures of each finding too")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of patients; default 1000")
    parser.add_argument("--output", metavar="FILE", help="all figures as JSON; default RUN_B/compare/A.json")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="run folder of a `place pretrain`")
    parser.add_argument("--output", required=True, help="folder that is written; must not be there yet")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a folder name such as step_00000100")
    parser.add_argument("--onnx", action="store_true", help="the vision encoder as ONNX too; needs the extra `onnx`")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=tuple(DATA_ACTIONS), help="page to look at, hashes checked, mean and deviation"
    )
    parser.add_argument("data", help="folder written by `place prepare`, or s3://BUCKET/PREFIX")
    parser.add_argument("--output", metavar="FILE", help="inspect: the page; none writes inspect.html beside the data")
    parser.add_argument("--per-split", type=int, default=8, help="inspect: images shown of each split. Default 8.")
    parser.add_argument("--num-workers", type=int, default=0, help="stats: processes; 0 takes one a core. Default 0.")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.usage = "place runs [-h] [--json] [FOLDER ...]\n       place runs stop RUN"
    parser.add_argument(
        "words", nargs="*", default=["runs"], metavar="FOLDER", help="lists the runs below; default runs. Or: stop RUN"
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file of the ladder; see configs/scale/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the base of every rung")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder; RUN/report.html is written, also while the run goes on")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("--gpu", default="h100", help="a100-40, a100-80, l40s, h100 or h200; default h100")
    parser.add_argument("--gpu-memory-gib", type=float, help="another size of memory than that GPU's")
    parser.add_argument("--mfu", type=float, default=0.2, help="share of peak FLOP/s that is reached; default 0.2")
    parser.add_argument("--scaling", metavar="FILE", help="scaling.json of a `place scale`: its model instead of --mfu")
    parser.add_argument("--samples", type=int, metavar="N", help="training pairs, where data.path is not prepared yet")
    parser.add_argument("--val-samples", type=int, default=0, metavar="N", help="validation pairs, with --samples")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="also looks at the data and folders of this run")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"), help="HOST:PORT of a standing Ray head; default RAY_ADDRESS"
    )
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="longest wait for a check; default 30")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as data.path=DIR run.dir=DIR")


def prepare(arguments: argparse.Namespace) -> int:
    """`place prepare`."""
    from place.data.prepare import run_prepare
    from place.screen import PrepareProgress

    config = build_prepare_config(arguments)
    with PrepareProgress() as progress:
        card = run_prepare(config, PREPARERS[config.launcher](config), progress.update)
    progress.print_card(card, config.output)
    return DONE


def _prepare_by_ray(config: PrepareConfig) -> Any:
    from place.cluster.prepare import map_over_ray

    return partial(map_over_ray, address=config.address)


def _prepare_here(_: PrepareConfig) -> Any:
    from place.data.pool import map_in_processes

    return map_in_processes


PREPARERS: dict[str, Callable[[PrepareConfig], Any]] = {"ray": _prepare_by_ray, "local": _prepare_here}


def build_prepare_config(arguments: argparse.Namespace) -> PrepareConfig:
    """What `place prepare` was told, checked."""
    from pydantic import ValidationError

    given = {key: value for key, value in vars(arguments).items() if key != "verb"}
    if "column" in given:
        given["columns"] = _split_pairs("column", given.pop("column"), "FIELD=NAME, such as image=filename")
    if "masks" in given:
        given["masks"] = _split_pairs("masks", given["masks"], "FINDING=PATTERN, such as lungs=masks/{stem}.png")
    if "labels" in given:
        given["label_columns"] = given.pop("labels")
    if "protocol" in given:
        from place.data.protocol import fill_options, read_protocol

        given = fill_options(given, read_protocol(given["protocol"]))
    elif "source" not in given:
        raise UsageError(f"say --source {'|'.join(get_args(SourceName))}, or --protocol configs/eval/NAME.yaml")
    try:
        return PrepareConfig.model_validate(given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UsageError(f"--{'.'.join(map(str, fault['loc'])).replace('_', '-')}: {fault['msg'].lower()}") from None


def _split_pairs(option: str, items: list[str], form: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        field, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--{option} {item}: write it as {form}")
        pairs[field] = value
    return pairs


def pretrain(arguments: argparse.Namespace) -> int:
    """`place pretrain`."""
    if arguments.schema:
        print(json.dumps(Config.model_json_schema(), indent=1))
        return DONE
    window = zip(("run.profile_step", "run.profile_steps"), (arguments.profile or "").split(":"), strict=False)
    asked = [f"{key}={value}" for key, value in window if value]
    config = build_config(arguments.config, [*arguments.overrides, *asked])
    return LAUNCHERS[config.cluster.launcher](config)


def _pretrain_by_ray(config: Config) -> int:
    from place.cluster.launch import launch
    from place.cluster.standing import check_standing
    from place.training.start import new_launch, prepare_run

    check_standing(config, os.environ)
    plan = prepare_run(config, config.cluster.num_workers)
    # Ray puts its own handlers in place of ours when it starts, so ours go in again.
    on_start = partial(_catch_signals, Path(config.run.dir))
    return _watch(config, plan, lambda: launch(config, new_launch(), on_start))


def _pretrain_here(config: Config) -> int:
    from place.cluster.worker import run_alone
    from place.training.start import prepare_run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("cluster.launcher=local: torchrun started several processes; set cluster.launcher=torchrun")
    return _watch(config, prepare_run(config, 1), lambda: run_alone(config))


def _pretrain_by_torchrun(config: Config) -> int:
    from place.cluster.worker import join_torchrun, run_alone
    from place.distributed import barrier
    from place.training.start import prepare_run

    world = join_torchrun(config)
    if not world.is_first:
        barrier()
        # torchrun passes what it gets on to every rank: one that died of it would take the checkpoint with it.
        _catch_signals(Path(config.run.dir))
        return STOPPED if run_alone(config) == "stopped" else DONE
    plan = prepare_run(config, world.world)
    barrier()
    return _watch(config, plan, lambda: run_alone(config))


LAUNCHERS: dict[str, Callable[[Config], int]] = {
    "ray": _pretrain_by_ray,
    "local": _pretrain_here,
    "torchrun": _pretrain_by_torchrun,
}


def _watch(config: Config, plan: Any, run: Callable[[], str]) -> int:
    """Run with the progress on the screen; a signal asks the run to stop at its next step."""
    from place.node import clean_node
    from place.runlog import hold_run, note_end, note_start
    from place.screen import RunScreen
    from place.training.stop import read_stop

    run_dir = Path(config.run.dir)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with hold_run(run_dir):
        _catch_signals(run_dir)
        try:
            note_start(run_dir)
            with RunScreen(config, plan) as screen:
                outcome = run()
            note_end(run_dir, outcome, read_stop(run_dir))
        except Exception as error:
            note_end(run_dir, "failed", str(error))
            raise
        finally:
            clean_node(run_dir)
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)
    screen.print_end(outcome)
    if outcome == "stopped":
        _note_requeue(run_dir)
        return STOPPED
    return DONE


def _note_requeue(run_dir: Path) -> None:
    """Tell slurm/pretrain.sh why another start of the job would go on, where one would."""
    from place.training.stop import ANOTHER_START, read_stop

    note, why = os.environ.get("PLACE_REQUEUE_NOTE"), read_stop(run_dir)
    if note and why.startswith(ANOTHER_START):
        Path(note).write_text(why + "\n")


def _catch_signals(run_dir: Path) -> None:
    """Turn signals that ask this process to end into a stop file, which the workers read at each step."""
    from place.training.stop import ask_to_stop

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, lambda got, _: ask_to_stop(run_dir, signal.Signals(got).name))


def evaluate(arguments: argparse.Namespace) -> int:
    """`place evaluate`."""
    from place.data.storage import find_folder
    from place.evaluation.suite import print_results, run_evaluation
    from place.screen import JudgeProgress, build_console

    if arguments.encoder is not None:
        return _evaluate_encoder(arguments)
    if arguments.random_weights:
        raise UsageError("--random-weights goes with --encoder; a run has weights of its own")
    run, data_dir = Path(arguments.run), find_folder(arguments.data)
    output = Path(arguments.output or run / "evaluation")
    source = run / "config.yaml"
    if not source.is_file():
        raise UsageError(f"{run} is no run folder (no config.yaml); give the run.dir of a `place pretrain`")
    own = build_config(source)
    is_own = data_dir.resolve() in [Path(stream.path).resolve() for stream in own.data.list_streams()]
    chosen = _choose_findings(arguments, () if is_own else own.evaluation.findings)
    evaluation = build_config(source, [*chosen, *arguments.overrides]).evaluation
    tasks, split, which = arguments.tasks.split(","), arguments.split, arguments.checkpoint
    with JudgeProgress() as screen:
        results = run_evaluation(run, data_dir, tasks, split, which, evaluation, output, screen.update)
    print_results(results, build_console())
    print(f"{output / 'report.html'}: {_PAGE}")
    return DONE


def _choose_findings(arguments: argparse.Namespace, named: Sequence[str]) -> list[str]:
    """The findings to judge, as words that come before those of the command line: those of the data set's protocol.

    Args:
        named: what the encoder's configuration judged on another data set; where this one lacks some of them, all of
            its own are judged.
    """
    from place.data.prepared import read_card

    if any(word.startswith("evaluation.findings=") for word in arguments.overrides):
        return []
    card = read_card(arguments.data)
    findings = card.get("protocol", {}).get("findings")
    if findings:
        return [f"evaluation.findings={json.dumps(findings)}"]
    absent = next((name for name in named if name not in card["labels"]), None)
    if absent is None:
        return []
    print(f"{arguments.data} has no label {absent!r}, which the encoder's own evaluation.findings name: all are judged")
    return ["evaluation.findings=[]"]


def _evaluate_encoder(arguments: argparse.Namespace) -> int:
    from place.data.storage import find_folder
    from place.evaluation.suite import print_results, run_encoder_evaluation
    from place.pretrained.load import is_export, read_evaluation
    from place.screen import JudgeProgress, build_console

    if arguments.output is None:
        raise UsageError("--output is needed with --encoder: the folder that results are written to")
    if arguments.checkpoint != "best":
        raise UsageError("--checkpoint goes with --run; an encoder is one set of weights")
    output, data_dir, console = Path(arguments.output), find_folder(arguments.data), build_console()
    if arguments.random_weights:
        console.print(f"{arguments.encoder}: random weights, seed 0; nothing has been learned", style="yellow")
    own = read_evaluation(arguments.encoder) if is_export(arguments.encoder) else {}
    chosen = _choose_findings(arguments, own.get("findings", ()))
    laid_over = [f"evaluation={json.dumps(own)}", *chosen, *arguments.overrides]
    evaluation = build_config(None, laid_over).evaluation
    tasks, split, is_random = arguments.tasks.split(","), arguments.split, arguments.random_weights
    with JudgeProgress() as screen:
        results = run_encoder_evaluation(
            arguments.encoder, data_dir, tasks, output, split, evaluation, is_random, screen.update
        )
    print_results(results, console)
    print(f"{output / 'report.html'}: {_PAGE}")
    return DONE


def compare(arguments: argparse.Namespace) -> int:
    """`place compare RUN_A RUN_B`."""
    from place.data.storage import find_folder
    from place.evaluation.compare import print_comparison, run_compare, write_comparison
    from place.screen import build_console

    if arguments.bootstrap < 100:
        raise UsageError(f"--bootstrap {arguments.bootstrap}: expected 100 resamples or more")
    first, second = Path(arguments.first), Path(arguments.second)
    output = Path(arguments.output or second / "compare" / f"{first.resolve().name}.json")
    tasks = [name for name in arguments.tasks.split(",") if name]
    data_dir = find_folder(arguments.data) if arguments.data else None
    found = run_compare(first, second, data_dir, arguments.bootstrap, tasks)
    print_comparison(found, build_console(), arguments.findings)
    write_comparison(found, arguments.bootstrap, output)
    print(f"{output}: all figures")
    return DONE


def export(arguments: argparse.Namespace) -> int:
    """`place export`."""
    from place.export import run_export

    exported = run_export(Path(arguments.run), Path(arguments.output), arguments.checkpoint, arguments.onnx)
    for note in exported.notes:
        print(note)
    print(f"{exported.folder}: {exported.size_mib:.1f} MiB; transformers.AutoModel loads it after `import place`")
    return DONE


def data(arguments: argparse.Namespace) -> int:
    """`place data inspect|verify|stats DIR`."""
    return DATA_ACTIONS[arguments.action](arguments)


def _inspect_data(arguments: argparse.Namespace) -> int:
    from place.data.inspect import collect_findings
    from place.data.inspect_page import build_page
    from place.data.prepare import PAGE
    from place.data.prepared import read_card
    from place.data.storage import open_store

    found = collect_findings(arguments.data, arguments.per_split)
    page = build_page(read_card(arguments.data), found, arguments.data)
    file = Path(arguments.output) if arguments.output else None
    store, name = (open_store(file.parent), file.name) if file else (open_store(arguments.data), PAGE)
    try:
        store.write(name, page.encode())
    except OSError as error:
        raise UsageError(f"cannot write {store}/{name}: {error.strerror or error}; give another --output") from None
    print(f"{store}/{name}: {len(page) >> 10:,} KiB, {len(found.samples)} images shown; holds report texts")
    return DONE


def _verify_data(arguments: argparse.Namespace) -> int:
    from place.data.verify import find_faults
    from place.screen import ShardProgress

    faults = 0
    with ShardProgress("verify") as progress:
        for fault in find_faults(arguments.data, progress.update):
            faults += 1
            progress.console.print(fault, markup=False, soft_wrap=True)
    if faults:
        raise RunError(
            f"{faults} damaged or missing in {arguments.data}: copy them anew, or run `place prepare` into a new folder"
        )
    print(f"{arguments.data}: {progress.done:,} shards, manifest and card are whole")
    return DONE


def _measure_data(arguments: argparse.Namespace) -> int:
    from place.data.prepared import read_card
    from place.data.stats import compute_stats
    from place.screen import ShardProgress, print_stats

    with ShardProgress("stats") as progress:
        sums = compute_stats(arguments.data, arguments.num_workers, progress.update)
    print_stats(sums, read_card(arguments.data)["image"], progress.console)
    return DONE


DATA_ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect_data,
    "verify": _verify_data,
    "stats": _measure_data,
}


def runs(arguments: argparse.Namespace) -> int:
    """`place runs [FOLDER ...]`: where each run stands. `place runs stop RUN`: ask one to end."""
    from place.runs import list_runs
    from place.screen import print_runs

    if arguments.words[0] == "stop":
        return _stop_run(arguments)
    standings = list_runs([Path(word) for word in arguments.words])
    if arguments.json:
        print(json.dumps([_to_json(standing._asdict()) for standing in standings], indent=1, allow_nan=False))
    else:
        print_runs(standings, arguments.words)
    return DONE


def _to_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values, those that are no number as null: JSON has no NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _stop_run(arguments: argparse.Namespace) -> int:
    """Ask a run to save a checkpoint at its next step and end with 85."""
    from place.training.stop import ask_to_stop

    if len(arguments.words) != 2 or arguments.json:
        raise UsageError("stop: expected one run folder, as in `place runs stop runs/mine`")
    run = Path(arguments.words[1])
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run folder (no config.yaml)")
    ask_to_stop(run, "place runs stop")
    print(f"{run}: asked to stop at the next step")
    return DONE


def report(arguments: argparse.Namespace) -> int:
    """`place report RUN`: RUN/report.html."""
    from place.reporting.page import write_report

    path = write_report(Path(arguments.run))
    print(f"{path}: {path.stat().st_size >> 10:,} KiB; holds no report texts")
    return DONE


def plan(arguments: argparse.Namespace) -> int:
    """`place plan`: what a run needs, before it costs anything."""
    from place.cluster.forecast import GPUS, Question, build_forecast
    from place.screen import print_forecast

    if arguments.gpu not in GPUS:
        raise UsageError(f"--gpu {arguments.gpu}: expected one of {', '.join(GPUS)}")
    if not 0 < arguments.mfu <= 1:
        raise UsageError(f"--mfu {arguments.mfu}: expected a share above 0 and up to 1")
    memory_gib = arguments.gpu_memory_gib or GPUS[arguments.gpu].memory_gib
    measured = Path(arguments.scaling) if arguments.scaling else None
    question = Question(arguments.gpu, memory_gib, arguments.mfu, arguments.samples, arguments.val_samples, measured)
    forecast = build_forecast(build_config(arguments.config, arguments.overrides), question)
    if arguments.json:
        print(json.dumps(forecast, indent=1))
    else:
        print_forecast(forecast)
    return DONE


def scale(arguments: argparse.Namespace) -> int:
    """`place scale`: a ladder of rungs; 1 when a run of one of them failed."""
    from place.cluster.scaling import list_faults, load_scale, run_ladder
    from place.cluster.scaling_page import write_results
    from place.screen import print_scaling

    path = Path(arguments.config)
    asked = load_scale(path, arguments.overrides)
    # Told to end, or left by its terminal, it takes the job of the rung with it; under nohup it stays.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(FAILED))
    keep = partial(write_results, Path(asked.folder), f"Scaling of {path.stem}")
    # A ladder that is stopped leaves a page of the rungs before.
    results = run_ladder(asked, path.parent / asked.base, partial(print, flush=True), partial(keep, with_png=False))
    page = keep(results)
    print_scaling(results, list(list_faults(results["rows"])))
    print(f"{page}: the same with plots; scaling.csv and scaling.json beside it")
    return FAILED if any(row["status"] != "ok" or row["runs_failed"] for row in results["rows"]) else DONE


def doctor(arguments: argparse.Namespace) -> int:
    """`place doctor`: one line a finding; 1 when anything failed."""
    from place.cluster.doctor.findings import exit_code
    from place.cluster.doctor.run import Options, run_doctor
    from place.screen import print_findings

    config = build_config(arguments.config, arguments.overrides)
    with_data = arguments.config is not None or any(item.startswith("data.path=") for item in arguments.overrides)
    findings = run_doctor(Options(config, with_data, arguments.address, arguments.timeout))
    if arguments.json and findings:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    elif findings:  # of the ranks of torchrun or srun only the first one speaks
        print_findings(findings)
    return exit_code(findings)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "compare": compare,
    "export": export,
    "data": data,
    "runs": runs,
    "report": report,
    "doctor": doctor,
    "plan": plan,
    "scale": scale,
}

if __name__ == "__main__":
    sys.exit(main())
