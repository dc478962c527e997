"""The published benchmarks by name: which columns their publishers chose, how their answers are graded.

Nothing is shipped: a benchmark is a file in a folder of the user's, `NAME.jsonl`, as it was published.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from gdro_jax.data import files, sources
from gdro_jax.data.sources import DataError, Problem, Source

CHOICES = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
      title: its name in tables.
      files: what its file is called, in order of preference.
      problem, answer: columns; a dot goes into a nested one.
      tolerance: column of an absolute error that a numeric answer may have.
      unit: column of its unit.
      verifier: of `gdro_jax.rewards`.
      private: its publisher asks that examples be kept out of reach of crawlers: neither the problems nor values of
        its rows are printed or written anywhere.
    """

    title: str
    files: tuple[str, ...]
    problem: str
    answer: str
    tolerance: str | None = None
    unit: str | None = None
    verifier: str = "math"
    private: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What its file may be called: its JSON-lines files may be parquet as well."""
        lines = [file for file in self.files if file.endswith(".jsonl")]
        return (*self.files, *(file.removesuffix(".jsonl") + ".parquet" for file in lines))


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "math500": Benchmark(title="MATH-500", files=("math500.jsonl",), problem="problem", answer="answer"),
        "math_test": Benchmark(title="MATH test", files=("math_test.jsonl",), problem="problem", answer="solution"),
        "aime24": Benchmark(title="AIME 2024", files=("aime24.jsonl",), problem="problem", answer="answer"),
        "aime25": Benchmark(title="AIME 2025", files=("aime25.jsonl",), problem="question", answer="answer"),
        "amc23": Benchmark(title="AMC 2023", files=("amc23.jsonl",), problem="problem", answer="answer"),
        "minerva_math": Benchmark(title="Minerva", files=("minerva_math.jsonl",), problem="problem", answer="solution"),
        "olympiadbench": Benchmark(
            title="OlympiadBench",
            files=("olympiadbench.jsonl",),
            problem="question",
            answer="final_answer",
            tolerance="error",
            unit="unit",
        ),
        "gsm8k_test": Benchmark(title="GSM8K", files=("gsm8k_test.jsonl",), problem="question", answer="answer"),
        "gpqa": Benchmark(
            title="GPQA",
            files=("gpqa_diamond.csv", "gpqa_diamond.jsonl", "gpqa_main.csv", "gpqa.csv", "gpqa.jsonl"),
            problem="Question",
            answer="Correct Answer",
            verifier="choice",
            private=True,
        ),
    }
)


def find(name: str, folder: str | Path) -> Path:
    """The file of a benchmark in a folder.

    Raises:
      DataError: an unknown name, no such folder, or no such file in it.
    """
    if name not in BENCHMARKS:
        close = get_close_matches(name, BENCHMARKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"benchmark {name!r} is unknown; it must be one of {', '.join(BENCHMARKS)}{hint}")
    files = [Path(folder) / file for file in BENCHMARKS[name].names]
    for file in files:
        if file.is_file():
            return file
    wanted = " or ".join(file.name for file in files)
    what = f"holds no {wanted}" if Path(folder).is_dir() else "is no folder"
    raise DataError(f"benchmark {name}: {folder} {what}; put the published file there")


def present(folder: str | Path) -> tuple[str, ...]:
    """Names of the benchmarks of which the folder holds a file."""
    return tuple(name for name, it in BENCHMARKS.items() if any((Path(folder) / file).is_file() for file in it.names))


def load(name: str, folder: str | Path, *, on_bad_row: str = "refuse") -> Source:
    """Problems of a benchmark with dense ids in the order of its file.

    Raises:
      DataError: no file, or a row that cannot be used (under `refuse`), in one line.
    """
    file, benchmark = find(name, folder), BENCHMARKS[name]
    if benchmark.verifier == "choice":
        return _multiple_choice(file, benchmark, on_bad_row)
    return sources.load(
        file,
        prompt_column=benchmark.problem,
        answer_column=benchmark.answer,
        tolerance_column=benchmark.tolerance,
        unit_column=benchmark.unit,
        on_bad_row=on_bad_row,
    )


def fingerprint(problems: Sequence[Problem]) -> str:
    """Tells whether two evaluations asked the same: of ids, problems and answers, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.id, problem.prompt, problem.answer)).encode())
    return digest.hexdigest()[:16]


# GPQA ---------------------------------------------------------------------------------------------------------------
def _multiple_choice(file: Path, benchmark: Benchmark, on_bad_row: str) -> Source:
    """Question and four options, lettered in an order that depends on the row's own text alone."""
    if file.suffix == ".csv":
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                rows: Sequence[Mapping[str, object] | None] = list(csv.DictReader(lines))
        except (csv.Error, UnicodeDecodeError):
            raise DataError(f"{file}: is not a CSV file of UTF-8 text") from None
    else:
        rows = [row for _, row in files.usable(str(file))]
    problems: list[Problem] = []
    dropped: list[sources.BadRow] = []
    for place, row in enumerate(rows, start=1):
        problem = _lettered(row, benchmark)
        if problem is not None:
            problems.append(replace(problem, id=len(problems)))
            continue
        reason = f"needs text in {benchmark.problem!r}, {benchmark.answer!r} and 'Incorrect Answer 1' to '3'"
        if on_bad_row == "refuse":
            raise DataError(f"{file}, row {place}: {reason}")
        dropped.append(sources.BadRow(place, reason))
    if not problems:
        raise DataError(f"{file}: none of its {len(rows)} rows is usable")
    return Source(tuple(problems), tuple(dropped))


def _lettered(row: Mapping[str, object] | None, benchmark: Benchmark) -> Problem | None:
    if row is None:
        return None
    columns = (benchmark.problem, benchmark.answer, *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    texts = [value.strip() for value in (row.get(column) for column in columns) if isinstance(value, str)]
    if len(texts) < len(columns) or not all(texts):
        return None
    question, right, *wrong = texts
    options = sorted([(right, True), *((text, False) for text in wrong)], key=lambda it: _mark(question, it[0]))
    listed = "\n".join(f"{letter}. {text}" for letter, (text, _) in zip(CHOICES, options, strict=True))
    answer = next(letter for letter, (_, is_right) in zip(CHOICES, options, strict=True) if is_right)
    subject = row.get("High-level domain") or row.get("Subdomain") or ""
    subject = subject if isinstance(subject, str) else ""
    prompt = f"{question}\n{listed}\nAnswer with the letter of the right option."
    return Problem(0, prompt, answer, subject or sources.NO_STRATUM, "", subject, bare=question)


def _mark(question: str, option: str) -> bytes:
    return hashlib.sha256(f"{question}\0{option}".encode()).digest()
