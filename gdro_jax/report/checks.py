"""What makes a comparison unfair or incomplete, said aloud: unequal budgets, missing seeds, differing settings."""

from collections.abc import Callable, Mapping, Sequence

from gdro_jax.report.runs import Run
from gdro_jax.report.scores import by_method, problems_at_score, rollouts_at_score
from gdro_jax.report.style import BASELINE, display_name

# Settings that runs of one comparison may differ in: what is compared, and where a run was written.
_FREE_SECTIONS = ("controller", "run")


def same_budget(runs: Sequence[Run], baseline: Sequence[Run]) -> bool:
    """True where each seed that both have spent equally many training rollouts for its final score."""
    return _same(rollouts_at_score, runs, baseline)


def same_problems(runs: Sequence[Run], baseline: Sequence[Run]) -> bool:
    """True where the final scores of each seed that both have are of equally many problems."""
    return _same(problems_at_score, runs, baseline)


def check(runs: Sequence[Run]) -> list[str]:
    """One sentence for each thing that a reader must know before comparing; empty for a fair, complete comparison."""
    groups = by_method(runs)
    found = _budgets(groups) + _problems(groups)
    for run in runs:
        if run.truncated:
            found.append(
                f"{run.folder.name}: the last line of metrics.jsonl was cut off (the run was killed) and left out."
            )
        planned = run.setting("run", "steps")
        if isinstance(planned, int) and run.num_steps < planned:
            found.append(f"{run.folder.name}: stopped at step {run.num_steps} of {planned}.")
        at = run.evaluated
        if at.size and at[-1] < len(run.records) - 1:
            found.append(
                f"{run.folder.name}: last evaluated at step {run.steps[at[-1]]}, not at its end (step {run.num_steps})."
            )
    if len(groups) > 1:
        seeds = {method: {run.seed for run in its} for method, its in groups.items()}
        every = set().union(*seeds.values())
        for method, its_seeds in seeds.items():
            if missing := sorted(every - its_seeds):
                found.append(
                    f"{display_name(method)} lacks seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}."
                )
        if BASELINE not in groups:
            found.append(f"No run of the baseline, {display_name(BASELINE)}: no differences are reported.")
    return found + _settings(runs)


def _budgets(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    spent = {
        method: sorted({value for run in its if (value := rollouts_at_score(run)) is not None})
        for method, its in groups.items()
    }
    if len({value for values in spent.values() for value in values}) < 2:
        return []
    listed = "; ".join(
        f"{display_name(method)} {' to '.join(f'{value:,.0f}' for value in dict.fromkeys((values[0], values[-1])))}"
        for method, values in spent.items()
        if values
    )
    return [
        f"Rollout budgets are not equal, final scores are not comparable as they stand ({listed} rollouts)."
        f"{_refused(rollouts_at_score, groups)}"
    ]


def _problems(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """A run that stopped early was last evaluated on a part of the problems, `eval.problems_per_stratum` of each."""
    numbers = {run.folder.name: problems_at_score(run) for its in groups.values() for run in its}
    known = {name: number for name, number in numbers.items() if number is not None}
    if len(set(known.values())) < 2:
        return []
    listed = "; ".join(f"{name} {number:,.0f}" for name, number in known.items())
    return [f"Final scores are of unequal numbers of problems ({listed}).{_refused(problems_at_score, groups)}"]


def _same(of: Callable[[Run], float | None], runs: Sequence[Run], baseline: Sequence[Run]) -> bool:
    theirs = {run.seed: of(run) for run in baseline}
    return all(of(run) == theirs[run.seed] for run in runs if run.seed in theirs)


def _refused(of: Callable[[Run], float | None], groups: Mapping[str, Sequence[Run]]) -> str:
    baseline = groups.get(BASELINE, [])
    unfair = [display_name(method) for method, its in groups.items() if not _same(of, its, baseline)]
    return f" Differences from {display_name(BASELINE)} are refused for: {', '.join(unfair)}." if unfair else ""


def _settings(runs: Sequence[Run]) -> list[str]:
    flat = [_flatten(run.config) for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for one in flat for key in one)
        if key.split(".")[0] not in _FREE_SECTIONS and len({repr(one.get(key)) for one in flat}) > 1
    ]
    found = []
    if differing:
        examples = [f"{key} ({', '.join(sorted({str(one.get(key)) for one in flat}))})" for key in differing[:6]]
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        found.append(f"Runs differ in settings other than the controller's: {'; '.join(examples)}{more}.")
    strata = {tuple(sorted(names)) for run in runs if (names := run.strata)}
    if len(strata) > 1:
        found.append("Runs were evaluated on different strata: the worst stratum is not the same question for all.")
    return found


def _flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
