"""The numbers of a study: `results.json`, and each of them as the words that tables and sentences show."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_ddpm.evaluation.report import check_comparable, paired, read_evaluation, versions
from hf_ddpm.variances import FIXED

BASE = "eps"  # what the others' bits/dim are compared with, image by image
NONE = "–"
OWN = "†"  # a learned variance, in the columns of the fixed ones
SIDES = {"fixed_large": "large", "fixed_small": "small"}
Words = dict[str, dict[str, str]]


def gather(
    out: Path, entries: Mapping[str, Any], settings: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Content of `results.json`: the runs' entries, their paired differences, how and where it was made."""
    scored = {name: entry for name, entry in entries.items() if "by_variance" in entry.get("bits", {})}
    for name, entry in scored.items():
        if BASE in scored and name != BASE and entry["T"] == scored[BASE]["T"]:
            base, own = read_evaluation(out / BASE), read_evaluation(out / name)
            check_comparable(own, base, BASE)
            entry["difference"] = paired(own, base)
            entry["difference"]["with"] |= {"name": BASE}  # it is a folder of this machine
    sittings = [json.loads(file.read_text(encoding="utf-8")) for file in (out / "sittings").glob("*.json")]
    return {
        "runs": dict(entries),
        "settings": dict(settings),
        "command": command,
        "seconds": sum(sitting["seconds"] for sitting in sittings),
        "sittings": len(sittings),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()}",
        "versions": versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def fd_of(
    entry: Mapping[str, Any], variance: str, which: str = "samples", metric: str = "FD"
) -> float | None:
    """The Fréchet distance of a run's samples (or of the floor's images), None if there is none."""
    found = entry.get("samples", {}).get(variance, {}).get(which, {})
    return next((value for name, value in found.items() if name.startswith(f"{metric} (")), None)


def bits_of(entry: Mapping[str, Any], variance: str, key: str = "bpd") -> Mapping[str, float] | None:
    """Value and standard error in bits/dim, None if there is none."""
    return entry.get("bits", {}).get("by_variance", {}).get(variance, {}).get(key)


def variance_in(entry: Mapping[str, Any], column: str) -> str:
    """The variance that stands in a column of the tables: a learned one stands in both."""
    return column if entry["variance_type"] in FIXED else entry["variance_type"]


def words(results: Mapping[str, Any]) -> Words:
    """Each run's numbers as the tables show them; where a stage failed, its text says so.

    Keys of a run, for the variance fixed_large: `large` (bits/dim), `rate_large`, `fd_large`, `cs_large`, and
    its place among the runs of the same T, `rank_large` and `rank_fd_large`; for fixed_small the same with
    "small". Then come `l_0`, `floor`, `difference`, `train`, `evaluate`, `sample`, `parameters` and `state`.
    The entry `best` is not a run: its `large`, `small`, `fd_large` and `fd_small` name the best run of
    T = 1000 and its number.
    """
    runs, found = results["runs"], {}
    for name, entry in runs.items():
        train, bits, samples = entry["train"], entry.get("bits", {}), entry.get("samples", {})
        failed = train.get("failed")
        row = {"state": failed or "trained to the end", "train": _seconds([train])}
        row["parameters"] = f"{train['parameters']:,}" if "parameters" in train else NONE
        row["evaluate"], row["sample"] = _seconds([bits]), _seconds(list(samples.values()))
        for column, side in SIDES.items():
            variance = variance_in(entry, column)
            mark = f" {OWN}" if variance != column else ""
            lost = failed or bits.get("failed", NONE)
            row[side] = _with_error(bits_of(entry, variance), lost) + mark
            row[f"rate_{side}"] = _with_error(bits_of(entry, variance, "rate_bpd"), lost) + mark
            row["l_0"] = _with_error(bits_of(entry, variance, "distortion_bpd"), lost)
            lost = failed or samples.get(variance, {}).get("failed", NONE)
            for metric in ("FD", "CS"):
                value = fd_of(entry, variance, metric=metric)
                row[f"{metric.lower()}_{side}"] = (lost if value is None else f"{value:.2f}") + mark
        floor = bits.get("floor_of_l_0")
        row["floor"] = NONE if floor is None else f"{floor:.3f}"
        difference = entry.get("difference")
        row["difference"] = NONE
        if difference is not None:
            row["difference"] = f"{difference['difference_bpd']:+.3f} ± {difference['stderr'] or 0:.3f}"
        found[name] = row
    for column, side in SIDES.items():
        for key, number in (("", bits_value), ("fd_", fd_of)):
            for steps in {entry["T"] for entry in runs.values()}:
                rivals = {n: number(e, variance_in(e, column)) for n, e in runs.items() if e["T"] == steps}
                places = sorted((value, name) for name, value in rivals.items() if value is not None)
                for name in rivals:
                    found[name][f"rank_{key}{side}"] = "no place"
                for place, (_, name) in enumerate(places, 1):
                    found[name][f"rank_{key}{side}"] = f"{place} of {len(places)}"
                if places and steps == 1000:
                    winner = places[0][1]
                    found.setdefault("best", {})[f"{key}{side}"] = f"`{winner}` ({found[winner][key + side]})"
    return found


def bits_value(entry: Mapping[str, Any], variance: str) -> float | None:
    """Bits/dim, None if there are none."""
    found = bits_of(entry, variance)
    return None if found is None else found["value"]


def _with_error(number: Mapping[str, Any] | None, otherwise: str) -> str:
    if number is None:
        return otherwise
    return f"{number['value']:.3f}" + ("" if number["stderr"] is None else f" ± {number['stderr']:.3f}")


def _seconds(stages: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of the stages; what was interrupted took longer."""
    if not any("seconds" in stage for stage in stages):
        return NONE
    least = "≥ " if any(stage.get("interrupted") for stage in stages if "images" not in stage) else ""
    return f"{least}{sum(stage.get('seconds', 0) for stage in stages):.0f}"
