"""The page of a study: tables, pictures, and a comparison with published orderings.

The comparison's text is `model_cards/study-digits/COMPARISON.md`, in which `{eps[large]}` stands for a number
of the run `eps`: the keys are those of `results.words`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pictures import figure, samples_picture
from results import BASE, OWN, SIDES, fd_of, words
from stages import NUM_REFERENCE

from hf_ddpm.variances import FIXED

COMPARISON = Path(__file__).parents[2] / "model_cards" / "study-digits" / "COMPARISON.md"


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: tables of bits/dim, then of samples and times; runs of another T have their own tables."""
    runs, said = results["runs"], words(results)
    head = {
        "bits": (
            "run | objective, output | bits/dim, `fixed_large` | bits/dim, `fixed_small` | rate, large | "
            f"rate, small | L_0 | least L_0 | difference to `{BASE}`"
        ),
        "quality": (
            "run | FD, `fixed_large` | FD, `fixed_small` | score, large | score, small | parameters | "
            "training, s | bits/dim, s | sampling, s"
        ),
    }
    keys = {
        "bits": "large small rate_large rate_small l_0 floor difference",
        "quality": "fd_large fd_small cs_large cs_small parameters train evaluate sample",
    }
    text = []
    for kind, title in (("bits", "Bits per dimension"), ("quality", "Samples, and what it cost")):
        text.append(f"## {title}\n")
        for steps in sorted({entry["T"] for entry in runs.values()}, reverse=True):
            columns = head[kind].count("|") + 1
            text += [f"T = {steps}:\n", f"| {head[kind]} |", "|---" * columns + "|"]
            for name, entry in runs.items():
                if entry["T"] == steps:
                    what = [f"{entry['changes']['objective']}, {entry['changes']['prediction_type']}"]
                    cells = [f"`{name}`", *(what if kind == "bits" else [])]
                    cells += [said[name][key] for key in keys[kind].split()]
                    text.append(f"| {' | '.join(cells)} |")
            text.append("")
    if any(entry["variance_type"] not in FIXED for entry in runs.values()):
        text.append(f"{OWN} It learns its variance, so one number, with its own, stands in both columns.\n")
    return "\n".join(text)


def comparison(results: Mapping[str, Any], text: str) -> str:
    """COMPARISON.md with its numbers.

    Raises:
        ValueError: it has a key of no number; the message names it.
    """

    class Run(dict):
        """A run's words."""

        def __missing__(self, key: str) -> str:
            if key in known:
                return "(not run)"
            raise ValueError(f"{COMPARISON.name} has the key {key!r}; allowed: {', '.join(sorted(known))}")

    class Runs(dict):
        """The words of all runs; a run that this study left out has none."""

        def __missing__(self, name: str) -> Run:
            return Run()

    said = words(results)
    known = {key for row in said.values() for key in row} | {"large", "small", "difference", "state"}
    known |= {f"{kind}_{side}" for kind in ("rate", "fd", "cs", "rank", "rank_fd") for side in SIDES.values()}
    return text.format_map(Runs({name: Run(row) for name, row in said.items()}))


def write_page(results: Mapping[str, Any], out: Path, page: Path) -> Path:
    """Write README.md, its pictures and results.json into the folder `page`; returns README.md."""
    page.mkdir(parents=True, exist_ok=True)
    figure(results, page / "study.png")
    pictured = samples_picture(results, out, page / "samples.png") is not None
    (page / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    file = page / "README.md"
    file.write_text(page_text(results, pictured), encoding="utf-8")
    return file


def page_text(results: Mapping[str, Any], pictured: bool) -> str:
    """Content of README.md; `pictured` says whether there is a picture of samples."""
    parts = [
        introduction(results),
        "![bits/dim and FD of each run](study.png)",
        tables(results).strip(),
        explanation(results),
        "![the first samples of each run](samples.png)" if pictured else "",
        comparison(results, COMPARISON.read_text(encoding="utf-8")).strip(),
        making(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(results: Mapping[str, Any]) -> str:
    """What the runs share."""
    runs, steps = results["runs"], results["settings"]["max_steps"]
    images = next((run["train"]["images"] for run in runs.values() if "failed" not in run["train"]), 0)
    return f"""# Objectives and parametrisations on the digits

{len(runs)} runs on the same data (UCI digits, 8x8, 1,497 for training), seed, batches, optimizer and
averaging: {steps:,} steps, {images:,} images each (`train_scripts/configs/digits.toml`, and what a run
changes in `RUNS` of `train_scripts/study/study.py`). Every network was trained once, so differences between
runs include the luck of one seed."""


def explanation(results: Mapping[str, Any]) -> str:
    """What the tables' numbers are."""
    runs, settings = results["runs"].values(), results["settings"]
    scored = [run["bits"] for run in runs if "by_variance" in run.get("bits", {})]
    floors = [floor for run in runs for v in run.get("samples", {}) if (floor := fd_of(run, v, "floor"))]
    images = f"{scored[0]['num_images']} held-out digits" if scored else "held-out digits"
    evals = f"{scored[0]['evaluations_per_image']} network evaluations each" if scored else ""
    steps = "all T" if settings["sampling_steps"] is None else f"at most {settings['sampling_steps']}"
    floor = f" Other real digits reach {floors[0]:.2f} against these." if floors else ""
    return f"""Bits/dim are the variational bound on {images}, {evals}, x_0 clipped, exact decoder; ± is the
standard error over images. "Least L_0" is what a network that knew x_0 exactly would pay for the first step:
where that step is wide, no network with a fixed variance goes below. The difference to `{BASE}` is paired,
image by image, each with the variance of its training. FD is the Fréchet distance by the features of
`train_scripts/classifiers/digits` (not FID) of {settings["num_samples"]} samples, drawn in {steps} steps, to
{NUM_REFERENCE} training digits.{floor} The score is the
classifier's (higher is better). Training time leaves out starting and saving."""


def making(results: Mapping[str, Any]) -> str:
    """The command, the machine and the time."""
    settings, used = results["settings"], results["versions"]
    packages = ", ".join(f"{name} {used[name]}" for name in ("python", "torch", "diffusers") if name in used)
    seconds, sittings = results["seconds"], results["sittings"]
    took = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
    took += f" in {sittings} sittings" if sittings > 1 else ""
    return f"""## How it was made

```
{results["command"]}
```

{took} on {results["machine"]}; runs at a time: {settings["jobs"]}, threads of each:
{settings["threads_per_job"]}; {results["date"]}, {packages}. That command writes this page: the numbers are
in `results.json`, the comparison's sentences in `COMPARISON.md`."""
