"""Reading run folders: `config.yaml` and `metrics.jsonl` become a `Run`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import yaml

PathType = str | PathLike[str]
Record = Mapping[str, object]


class RunError(ValueError):
    """A run folder that cannot be read; the message names the file, and the line where there is one."""


class EmptyRunError(RunError):
    """A run folder with no complete step in it yet."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its folder tells it. `records` are the lines of metrics.jsonl, `lines` their line numbers (from 1)."""

    folder: Path
    method: str
    seed: int
    config: Mapping[str, object]
    records: tuple[Record, ...]
    lines: tuple[int, ...]
    truncated: bool = False  # the last line was cut off (the run was killed) and left out

    @cached_property
    def steps(self) -> np.ndarray:
        """int[N], the step of each record; 0 is the evaluation before training."""
        return np.array([_step(record) for record in self.records], dtype=np.int64)

    @cached_property
    def _read(self) -> dict[tuple[str, ...], np.ndarray]:
        """The scalar columns read so far: figures and tables ask for the same ones many times."""
        return {}

    @property
    def num_steps(self) -> int:
        return int(self.steps[-1])

    def scalars(self, *path: str) -> np.ndarray:
        """float64[N], the field at `path` of each record, NaN where it is null or absent.

        Raises RunError, naming file and line, where it is something other than a number.
        """
        if path not in self._read:
            values = [self._number(value, line, path) for line, value in self._values(path)]
            self._read[path] = np.array(values, dtype=np.float64)
            self._read[path].flags.writeable = False
        return self._read[path]

    def vectors(self, *path: str) -> np.ndarray:
        """float64[N, B], the list at `path` of each record, NaN where an entry is null or the list absent.

        B is 0 where no record has the field. Raises RunError where the length changes or an entry is no number.
        """
        rows: list[list[float] | None] = []
        width: int | None = None
        for line, value in self._values(path):
            if value is None:
                rows.append(None)
                continue
            if not isinstance(value, list):
                raise self._bad(line, path, value, "a list of numbers")
            if width is not None and len(value) != width:
                raise self._bad(line, path, value, f"a list of {width} numbers, as on earlier lines")
            width = len(value)
            rows.append([self._number(entry, line, path) for entry in value])
        gap = [np.nan] * (width or 0)
        return np.array([gap if row is None else row for row in rows], dtype=np.float64).reshape(len(rows), width or 0)

    @cached_property
    def evaluated(self) -> np.ndarray:
        """int[E], the indices of the records that hold an evaluation."""
        holds = [isinstance(record.get("eval"), Mapping) for record in self.records]
        return np.flatnonzero(np.array(holds, dtype=bool))

    @cached_property
    def strata(self) -> tuple[str, ...]:
        """Every evaluated stratum, in the order of first appearance."""
        found = [_dig(self.records[index], ("eval", "strata")) for index in self.evaluated]
        return tuple(dict.fromkeys(str(name) for strata in found if isinstance(strata, Mapping) for name in strata))

    def last(self, *path: str) -> float | None:
        """The last number at `path`, or None where no record has one."""
        values = self.scalars(*path)
        values = values[np.isfinite(values)]
        return float(values[-1]) if values.size else None

    def setting(self, *path: str) -> object:
        """A value of config.yaml, None where absent."""
        return _dig(self.config, path)

    def _values(self, path: tuple[str, ...]) -> Iterator[tuple[int, object]]:
        for line, record in zip(self.lines, self.records, strict=True):
            yield line, _dig(record, path)

    def _number(self, value: object, line: int, path: tuple[str, ...]) -> float:
        if value is None:
            return float("nan")
        if not isinstance(value, (int, float)):
            raise self._bad(line, path, value, "a number or null")
        return float(value) if abs(value) < float("inf") else float("nan")

    def _bad(self, line: int, path: tuple[str, ...], value: object, wanted: str) -> RunError:
        field = ".".join(path)
        return RunError(f"{self.folder / 'metrics.jsonl'}:{line}: {field} is {str(value)[:60]!r}, expected {wanted}")


def read_run(folder: PathType) -> Run:
    """Read one run folder.

    A last line that a killed run left unfinished (no newline, no JSON) is left out. Where a resumed run wrote a step
    again, the later line counts. Method and seed are `run.method` and `run.seed` of config.yaml.
    Raises RunError (a ValueError) naming file and line; EmptyRunError where no step is complete.
    """
    folder = Path(folder)
    check_folder(folder)
    config = read_yaml(folder / "config.yaml")
    records, lines, truncated = _read_metrics(folder / "metrics.jsonl")
    method = _dig(config, ("run", "method")) or _dig(config, ("controller", "name")) or folder.name
    seed = _dig(config, ("run", "seed"))
    if seed is not None and not isinstance(seed, int):
        raise RunError(f"{folder / 'config.yaml'}: run.seed is {seed!r}, expected a whole number")
    return Run(
        folder=folder,
        method=str(method),
        seed=0 if seed is None else seed,
        config=config,
        records=tuple(records),
        lines=tuple(lines),
        truncated=truncated,
    )


def check_folder(path: Path) -> None:
    """RunError unless it is a folder."""
    if not path.is_dir():
        raise RunError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")


def read_yaml(path: Path) -> dict[str, object]:
    """A YAML file that holds a mapping; RunError naming it otherwise."""
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: holds {type(content).__name__}, expected a mapping of sections")
    return content


def _read_metrics(path: Path) -> tuple[list[Record], list[int], bool]:
    if not path.is_file():
        raise EmptyRunError(f"{path}: no such file")
    *whole, rest = path.read_bytes().split(b"\n")
    kept: list[tuple[int, Record]] = []
    for number, line in enumerate(whole, start=1):
        if line.strip():
            _append(kept, number, _parse(line, f"{path}:{number}"))
    truncated = False
    if rest.strip():
        try:
            _append(kept, len(whole) + 1, _parse(rest, f"{path}:{len(whole) + 1}"))
        except RunError:
            truncated = True
    if not kept:
        raise EmptyRunError(f"{path}: no complete step in it")
    return [record for _, record in kept], [number for number, _ in kept], truncated


def _append(kept: list[tuple[int, Record]], number: int, record: Record) -> None:
    """Add a record; one that goes back to an earlier step (a resumed run) replaces what was written from there on."""
    while kept and _step(kept[-1][1]) >= _step(record):
        kept.pop()
    kept.append((number, record))


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RunError(f"{where}: holds {type(record).__name__}, expected a JSON object")
    step = record.get("step")
    if not isinstance(step, int) or step < 0:
        raise RunError(f"{where}: step is {step!r}, expected a whole number of at least 0")
    return record


def _step(record: Record) -> int:
    step = record["step"]
    assert isinstance(step, int)
    return step


def _dig(value: object, path: Sequence[str]) -> object:
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
