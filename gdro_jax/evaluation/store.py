"""The folder of an evaluation: settings, problems and every response, so that it resumes and can be graded again.

`settings.json` is everything that must be alike; for each set `NAME.problems.jsonl` (without the text of a set whose
publisher asks for that) and `NAME.responses.jsonl`, one response a line as they are graded, in order once all are.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gdro_jax.data.sources import Problem
from gdro_jax.evaluation.run import Graded

SETTINGS, SUMMARY = "settings.json", "summary.json"
MODEL_SETTINGS = ("model", "weights", "seed")
"""The settings in which evaluations that are compared may differ."""


class StoreError(ValueError):
    """A folder that does not hold what is needed; its text is one line."""


class Saved(NamedTuple):
    """One evaluation: its settings, and the problems and responses of each set by name."""

    settings: dict[str, Any]
    problems: dict[str, tuple[Problem, ...]]
    responses: dict[str, list[Graded]]


def begin(
    folder: pathlib.Path, settings: Mapping[str, Any], sets: Mapping[str, tuple[Sequence[Problem], bool]]
) -> None:
    """Writes settings and problems ((problems, private) by name), or checks that the folder was begun with the same.

    Raises:
      StoreError: it was begun with other settings.
    """
    file, wanted = folder / SETTINGS, json.loads(json.dumps(settings))
    if file.is_file():
        found = _object(file)
        unlike = differences(found, wanted)
        if unlike:
            (first, before, now), names = unlike[0], ", ".join(name for name, *_ in unlike)
            raise StoreError(
                f"{folder}: was begun with another {names} ({first}: {_short(before)}, now {_short(now)}); "
                "choose another folder"
            )
        return
    for name, (problems, private) in sets.items():
        rows = [dataclasses.asdict(problem) for problem in problems]
        write_rows(
            folder / f"{name}.problems.jsonl", [row | {"prompt": None, "bare": ""} if private else row for row in rows]
        )
    _replace(file, json.dumps(wanted, indent=2) + "\n")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], within: str = "") -> list[tuple[str, Any, Any]]:
    """What two nested objects have unlike: where, as `sets.aime24.verifier`, and both values, None where missing."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*a, *b}):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{within}{key}.")
        elif one != other:
            found.append((f"{within}{key}", one, other))
    return found


def resume(folder: pathlib.Path, name: str) -> list[Graded]:
    """Responses graded so far; the line that was being written at an interrupt is cut off the file."""
    file = _responses(folder, name)
    if not file.is_file():
        return []
    rows: dict[tuple[int, int], Graded] = {}
    for line in file.read_bytes().splitlines():
        try:
            row = Graded(**json.loads(line))
        except (ValueError, TypeError):  # the line that was being written
            continue
        rows[row.problem, row.rank] = row
    replace(folder, name, rows.values())
    return list(rows.values())


def replace(folder: pathlib.Path, name: str, rows: Iterable[Graded]) -> None:
    """Writes the responses of a set in place of those that its file holds, whole or not at all."""
    write_rows(_responses(folder, name), (row._asdict() for row in rows))


def append(folder: pathlib.Path, name: str, rows: Iterable[Graded]) -> None:
    """Adds responses to a set's file."""
    with _responses(folder, name).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row._asdict()) + "\n" for row in rows))


def read(folder: pathlib.Path) -> Saved:
    """A whole evaluation.

    Raises:
      StoreError: there is none, or it is not complete.
    """
    settings = _object(folder / SETTINGS)
    problems: dict[str, tuple[Problem, ...]] = {}
    responses: dict[str, list[Graded]] = {}
    for name in settings.get("sets", {}):
        try:
            found = _lines(folder / f"{name}.problems.jsonl")
            problems[name] = tuple(Problem(**(row | {"prompt": row["prompt"] or ""})) for row in found)
            responses[name] = [Graded(**row) for row in _lines(_responses(folder, name))]
        except (TypeError, KeyError):
            raise StoreError(f"{folder}: {name} was not written by gdro eval") from None
        wanted = {(problem.id, rank) for problem in problems[name] for rank in range(settings["samples"])}
        there = [(row.problem, row.rank) for row in responses[name]]
        if set(there) != wanted or len(there) != len(wanted):
            raise StoreError(
                f"{folder}: {name} holds {len(wanted.intersection(there))} of {len(wanted)} responses, in {len(there)} "
                "lines; give the same gdro eval command again to finish it"
            )
    return Saved(settings, problems, responses)


def reported_k(folder: pathlib.Path) -> int | None:
    """The k of the summary as training logs it, None where the folder holds none.

    Raises:
      StoreError: its summary is not a JSON object.
    """
    file = folder / SUMMARY
    k = _object(file).get("k") if file.is_file() else None
    return k if isinstance(k, int) else None


def _responses(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.responses.jsonl"


def write_rows(file: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all."""
    _replace(file, "".join(json.dumps(row) + "\n" for row in rows))


def _replace(file: pathlib.Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _object(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except OSError:
        raise StoreError(f"{file.parent}: is no evaluation, it holds no {file.name}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StoreError(f"{file}: is not a JSON object")
    return found


def _lines(file: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_bytes().splitlines()]
    except OSError:
        raise StoreError(f"{file.parent}: holds no {file.name}; give the same gdro eval command again") from None
    except ValueError:
        raise StoreError(f"{file}: is not JSON lines") from None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
