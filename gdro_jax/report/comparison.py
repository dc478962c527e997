"""Reading a compare folder, or several run folders, as one list of runs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from gdro_jax.report.runs import EmptyRunError, PathType, Run, RunError, check_folder, read_run, read_yaml


def read_comparison(folders: PathType | Sequence[PathType]) -> list[Run]:
    """Read a compare folder, a run folder, or several of either, in the order given.

    Labels of compare.yaml (`runs: {folder: {method, seed}}`) replace those of the runs' own configs. Runs that have
    no complete step yet are left out with a RuntimeWarning. Raises RunError where nothing is left to report, or where
    two runs are the same method and seed (nothing could be paired then).
    """
    paths = [folders] if isinstance(folders, (str, PathLike)) else list(folders)
    runs: list[Run] = []
    for folder in (Path(path) for path in paths):
        check_folder(folder)
        is_run = (folder / "metrics.jsonl").exists() or (folder / "config.yaml").exists()
        runs += [read_run(folder)] if is_run else _read_compare_folder(folder)
    if not runs:
        raise RunError(f"{', '.join(str(path) for path in paths) or 'no folder given'}: no run to report")
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        other = seen.setdefault((run.method, run.seed), run.folder)
        if other != run.folder:
            raise RunError(f"{other} and {run.folder} are both method {run.method!r}, seed {run.seed}")
    return list({run.folder: run for run in runs}.values())


def _read_compare_folder(folder: Path) -> list[Run]:
    labels: dict[str, Mapping[str, object]] = {}
    if (folder / "compare.yaml").exists():
        listed = read_yaml(folder / "compare.yaml").get("runs")
        if not isinstance(listed, dict) or not all(isinstance(label, dict) for label in listed.values()):
            raise RunError(f"{folder / 'compare.yaml'}: runs is {listed!r}, expected a mapping of run folders")
        labels = {str(name): label for name, label in listed.items()}
    else:
        labels = {path.parent.name: {} for path in sorted(folder.glob("*/metrics.jsonl"))}
    runs, waiting = [], []
    for name, label in labels.items():
        if not (folder / name / "metrics.jsonl").exists():
            waiting.append(name)
            continue
        try:
            run = read_run(folder / name)
        except EmptyRunError:
            waiting.append(name)
            continue
        method, seed = label.get("method", run.method), label.get("seed", run.seed)
        if not isinstance(seed, int):
            raise RunError(f"{folder / 'compare.yaml'}: runs.{name}.seed is {seed!r}, expected a whole number")
        runs.append(replace(run, method=str(method), seed=seed))
    if waiting and runs:
        warnings.warn(f"{folder}: left out, no complete step yet: {', '.join(waiting)}", RuntimeWarning, stacklevel=3)
    return runs
