"""`make study`: ten objectives and parametrisations on the same data, seed and budget, in one table.

Each run is trained, scored in bits/dim with both fixed variances, and sampled with both; what is finished is
not done again, so a killed study goes on with the same command. Whatever fails by itself, because its loss
explodes or its samples are not finite, is a line in the table. `page.py` makes the page.
"""

import argparse
import json
import multiprocessing
import shlex
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from page import write_page
from results import gather
from stages import CLASSIFIER, Study, do_run, write_json

from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.folders.output import check_strangers, output_folder
from hf_ddpm.runtime.arguments import Parser, run
from hf_ddpm.runtime.processes import process_state

# The runs: what each changes in configs/digits.toml.
CHAIN_OF_50 = {"num_train_timesteps": 50, "beta_schedule": "constant", "beta_start": 0.2}
SDDPM = {"objective": "sddpm", "prediction_type": "mean", **CHAIN_OF_50}
RUNS: dict[str, dict[str, Any]] = {
    "eps": {"prediction_type": "epsilon", "objective": "simple"},
    "x0": {"prediction_type": "sample", "objective": "simple"},
    "v": {"prediction_type": "v_prediction", "objective": "simple"},
    "mean": {"prediction_type": "mean", "objective": "simple"},
    "score": {"prediction_type": "score", "objective": "simple"},
    "eps-bound": {"prediction_type": "epsilon", "objective": "bound"},
    "eps-hybrid": {"prediction_type": "epsilon", "objective": "hybrid", "variance_type": "learned_range"},
    "eps-min-snr": {"prediction_type": "epsilon", "objective": "min-snr"},
    "sddpm-conv": {"model": "conv-autoencoder", **SDDPM},
    "sddpm-shallow": {"model": "shallow-autoencoder", **SDDPM},
}

MAX_STEPS = 4000
NUM_SAMPLES = 748


def settle(study: Study, names: Sequence[str]) -> None:
    """Refuse what can't be done, and a folder that holds another study, before any work.

    Raises:
        ValueError: the message names the culprit.
    """
    for name in names:
        if name not in RUNS:
            raise ValueError(f"only has {name!r}; allowed: {', '.join(RUNS)}")
        study.config(name)
    EvaluationConfig(
        extractor=str(CLASSIFIER), num_samples=study.num_samples, sampling_steps=study.sampling_steps
    )
    for name in names:
        file = study.out / "stages" / f"{name}.settings.json"
        wanted = study.settings | {"changes": RUNS[name]}
        if not file.exists():
            write_json(file, wanted)
        there = json.loads(file.read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if there.get(key) != value:
                raise ValueError(
                    f"{key} is {value!r}, but out {str(study.out)!r} holds a study with {there.get(key)!r}; "
                    "allowed: the same, or another folder"
                )


def do_together(study: Study, names: Sequence[str], jobs: int) -> None:
    """Do the runs in processes of one thread each: two such are faster than two threads on 8x8 images.

    Raises:
        RuntimeError: one ended early; it has said why.
    """
    # So that SIGTERM ends the processes too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    spawn, left, running = multiprocessing.get_context("spawn"), list(names), {}
    while left or running:
        while left and len(running) < jobs:
            process = spawn.Process(target=do_alone, args=(study, name := left.pop(0)), daemon=True)
            process.start()
            running[process.sentinel] = name, process
        for sentinel in wait(list(running)):
            name, process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                raise RuntimeError(
                    f"the run {name!r} ended with exit code {process.exitcode}; the same command goes on"
                )


def do_alone(study: Study, name: str) -> None:
    """One run as a process of its own, which a signal ends as it ends `hf-ddpm train`."""
    torch.set_num_threads(1)

    def command(argv: Sequence[str], prog: str) -> None:
        do_run(study, name)

    run(command, [], f"study.py, {name}")


def study_command(argv: Sequence[str], prog: str) -> None:
    """Do the study, or go on with one that was interrupted."""
    parser = Parser(prog, __doc__ or "")
    parser.add_argument("--out", default="runs/study", type=Path, metavar="DIR", help="[runs/study]")
    parser.add_argument(
        "--page", type=Path, metavar="DIR", help="folder that gets README.md and pictures [DIR of --out]"
    )
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS, metavar="N", help=f"[{MAX_STEPS}]")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--num-samples", type=int, default=NUM_SAMPLES, metavar="N", help=f"[{NUM_SAMPLES}]")
    parser.add_argument("--sampling-steps", type=int, metavar="N", help="at most; by default all T")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="runs at a time, with a thread each; 1: no processes"
    )
    args = parser.parse(argv)
    names = list(RUNS) if args.only is None else list(dict.fromkeys(args.only.split(",")))
    study = Study(args.out, args.max_steps, args.num_samples, args.sampling_steps, RUNS, time.time())
    if args.jobs < 1:
        raise ValueError(f"jobs is {args.jobs}; allowed: whole numbers >= 1")
    with output_folder(args.out, "out", check_folder, process_state()):
        do_study(args, study, names, argv, prog)


def check_folder(out: Path) -> None:
    """Refuse a folder of other things than a study."""
    check_strangers(out, "out", ("stages", "sittings", "results.json", *RUNS), (out / "stages").is_dir())


def do_study(
    args: argparse.Namespace, study: Study, names: Sequence[str], argv: Sequence[str], prog: str
) -> None:
    """All runs, and the page that tells of them."""
    settle(study, names)
    if args.jobs > 1:
        do_together(study, names, args.jobs)
    entries = {name: do_run(study, name) for name in names}
    command = f"python train_scripts/study/{Path(prog).name} {shlex.join(argv)}".strip()
    threads = torch.get_num_threads() if args.jobs == 1 else 1
    settings = study.settings | {"jobs": args.jobs, "threads_per_job": threads}
    results = gather(args.out, entries, settings, command)
    write_json(args.out / "results.json", results)
    print(write_page(results, args.out, args.page or args.out))


if __name__ == "__main__":
    run(study_command)
