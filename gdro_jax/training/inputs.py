"""The problems of a run: loaded, mixed, their gold answers checked, duplicates and overlaps with evaluations found."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from gdro_jax import rewards
from gdro_jax.data import benchmarks, contamination, procedural, prompts, sources, tasks
from gdro_jax.data.sources import DataError, Problem, Source
from gdro_jax.training.config import Config

SHOWN = 3
"""How many rows a note names before it only counts."""
MOST_LINES = 40
"""How many lines an error about gold answers names."""


class Inputs(NamedTuple):
    """Problems before any tokenizer saw them; `heldout` is None where there is no evaluation."""

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...] | None
    notes: tuple[str, ...]


def load(config: Config) -> Inputs:
    """Everything a run is trained and evaluated on.

    Raises:
      DataError: with one clear line.
    """
    data = config.data
    notes: list[str] = []
    names = [data.train] if data.mixture is None else list(data.mixture)
    field = "data.train" if data.mixture is None else "data.mixture"
    train: list[Problem] = []
    with verifier(config) as grader:
        for part, name in enumerate(names):
            problems, more = checked(name, "train", config, grader, field)
            train += [replace(problem, id=len(train) + n, part=part) for n, problem in enumerate(problems)]
            notes += more
        heldout = None
        if config.eval.data is not None:
            heldout, more = checked(config.eval.data, "heldout", config, grader, "eval.data")
            notes += more
    if data.contamination is not None:
        train, more = _uncontaminated(train, heldout, names, config)
        notes += more
    return Inputs(tuple(train), heldout, tuple(notes))


def checked(
    name: str, split: str, config: Config, grader: rewards.Verifier, field: str | None = None
) -> tuple[tuple[Problem, ...], list[str]]:
    """Problems of a file, or the shipped `split` for `embedded`, and a line for each row that was left out.

    Args:
      field: what the file was given as, which an error begins with; None for an argument of a command.

    Raises:
      DataError: a row that cannot be used or a gold answer that cannot be graded, where the configuration refuses it.
    """
    try:
        problems, notes = _of_name(name, split, config, grader)
    except DataError as error:
        raise DataError(str(error) if field is None else f"{field}: {error}") from None
    return problems, [*notes, *_tried(grader, config.data.verifier, problems)]


def _of_name(
    name: str, split: str, config: Config, grader: rewards.Verifier
) -> tuple[tuple[Problem, ...], Sequence[str]]:
    if name == "embedded":
        return procedural.embedded(split), ()
    if name.startswith(tasks.PREFIX):
        return tasks.parse(name), ()
    source = sources.load(
        name,
        prompt_column=config.data.prompt_column,
        answer_column=config.data.answer_column,
        stratum_column=config.data.stratum_column,
        on_bad_row=config.data.on_bad_row,
    )
    return with_usable_answers(name, source, config.data.gold_check, grader)


def ready(
    problems: Sequence[Problem], template: str, tokenizer: prompts.Tokenizer, config: Config, most: int | None
) -> tuple[prompts.Prompts, list[str]]:
    """Problems as token ids, and a line if any was left out as too long, with more than `most` tokens.

    Raises:
      DataError: with one clear line.
    """
    out = prompts.prepare(
        problems,
        tokenizer,
        template=template,
        chat=config.data.chat,
        max_tokens=most,
        on_overlong=config.data.overlong,
    )
    notes = (
        [f"{len(out.dropped)} of {len(problems)} prompts dropped as too long, above {most} tokens"]
        if out.dropped
        else []
    )
    return out, notes


def first_prompt(ready: prompts.Prompts, tokenizer: prompts.Tokenizer) -> str:
    """The line that shows a prompt as the model gets it, decoded from its token ids."""
    first = list(ready.tokens[0])
    return f"first prompt, {len(first)} tokens: {tokenizer.decode(first)!r}"


def verifier(config: Config, name: str | None = None) -> rewards.Verifier:
    """The run's verifier, or the one of that name with the run's settings; to be closed after use."""
    data = config.data
    return rewards.make(name or data.verifier, workers=data.verifier_workers, timeout=data.verifier_timeout)


def _tried(grader: rewards.Verifier, name: str, problems: Sequence[Problem]) -> list[str]:
    """A user's verifier is called once: one that cannot be imported is refused, one that gives no verdict is noted."""
    if ":" not in name:
        return []
    try:
        grades = grader.grade([problems[0].answer], [problems[0].answer])
    except rewards.VerifierError as error:
        raise DataError(f"data.verifier={name!r}: {error}") from None
    gave_up = "no verdict on the first gold answer, given as the response"
    return [f"data.verifier={name}: {gave_up} ({reason})" for reason in grades.failures]


def with_usable_answers(
    name: str, source: Source, choice: str | None, grader: rewards.Verifier
) -> tuple[tuple[Problem, ...], list[str]]:
    """Problems whose gold answers can be graded, and a line for each row that is left out.

    Raises:
      DataError: a gold answer that cannot be graded under `refuse`, or none that can.
    """
    notes = [f"{name}, line {row.line}: dropped, {row.reason}" for row in source.dropped]
    if source.repeated:
        notes.append(f"{name}: {source.repeated} rows that repeat an earlier one left out")
    bad = {} if choice is None else grader.check(problem.answer for problem in source.problems)
    lines = [
        f"{name}, line {source.problems[row].line}: its answer cannot be graded, {why}" for row, why in bad.items()
    ]
    if lines and choice == "refuse":
        others = [source.problems[row].line for row in bad][1:]
        more = f"; other such lines: {_numbers(others)}" if others else ""
        raise DataError(f"{lines[0]}{more}; data.gold_check=drop leaves such rows out, and says why of each")
    kept = [problem for row, problem in enumerate(source.problems) if row not in bad]
    if not kept:
        raise DataError(f"{name}: none of its {len(source.problems)} answers can be graded; the first, {lines[0]}")
    return tuple(replace(problem, id=n) for n, problem in enumerate(kept)), [
        *notes,
        *(f"{it}; dropped" for it in lines),
    ]


def _numbers(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:MOST_LINES]))
    return shown if len(lines) <= MOST_LINES else f"{shown} and {len(lines) - MOST_LINES} more"


def _uncontaminated(
    train: list[Problem], heldout: Sequence[Problem] | None, names: Sequence[str], config: Config
) -> tuple[list[Problem], list[str]]:
    """The training problems that stay, and what was found."""
    against: dict[str, Sequence[Problem]] = {}
    notes: list[str] = []
    if heldout is not None:
        against[str(config.eval.data)] = heldout
    folder = config.data.benchmarks
    if folder is not None:
        present = benchmarks.present(folder)
        if not present:
            raise DataError(
                f"data.benchmarks={folder!r}: holds no benchmark; known: {', '.join(benchmarks.BENCHMARKS)}"
            )
        against |= {name: benchmarks.load(name, folder, on_bad_row="drop").problems for name in present}
    elif not all(name == "embedded" or name.startswith(tasks.PREFIX) for name in names):
        notes.append("data.benchmarks is null: overlaps with benchmarks are not looked for")
    found = contamination.find(train, against)
    if config.eval.data in names:  # evaluation on the training set itself is asked for, and no news
        found = [it for it in found if it.where != config.eval.data]
    choice = config.data.contamination
    said = _notes(found, train, against, names, dropped=choice == "drop")
    notes += said
    if found and choice == "refuse":
        raise DataError(f"{said[0]}; data.contamination=drop leaves such problems out, report only says so")
    if choice == "drop":
        gone = {it.problem for it in found}
        train = [replace(p, id=n) for n, p in enumerate(p for p in train if p.id not in gone)]
        if not train:
            raise DataError("data.contamination='drop': no training problem is left")
    return train, notes


def _notes(
    found: Sequence[contamination.Overlap],
    train: Sequence[Problem],
    against: Mapping[str, Sequence[Problem]],
    names: Sequence[str],
    *,
    dropped: bool,
) -> list[str]:
    """A line for each set that problems are the same as or overlap, with the first few of them."""

    def place(problem: Problem, name: str) -> str:
        return f"{name}, line {problem.line}" if problem.line else f"{name}, problem {problem.id}"

    notes = []
    for where in dict.fromkeys(it.where for it in found):
        mine = [it for it in found if it.where == where]
        same = sum(it.same for it in mine)
        shown = []
        for it in mine[:SHOWN]:
            problem = train[it.problem]
            other = train[it.other] if where == contamination.TRAINING else against[where][it.other]
            name = names[other.part] if where == contamination.TRAINING else where
            verb = "is" if it.same else "overlaps"
            shown.append(f"{place(problem, names[problem.part])} {verb} {place(other, name)}")
        counts = f"{same} the same as a problem of {where}" + (
            f", {len(mine) - same} overlapping one" * (same < len(mine))
        )
        verdict = "dropped" if dropped else "kept"
        notes.append(f"{len(mine)} training problems {verdict}: {counts} ({'; '.join(shown)})")
    return notes
