r"""Problems from JSON-lines and parquet files, as their publishers wrote them; answers made plain, bad rows named.

Answer forms that are understood: text, whole numbers, floats that mean whole numbers (70.0), lists of answers, a
solution whose last ``\boxed{}`` holds the answer (MATH, Minerva), and a solution whose answer follows ``####`` (GSM8K).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from gdro_jax.data import files
from gdro_jax.data.files import Bad, DataError, show
from gdro_jax.rewards import plain_numbers, units
from gdro_jax.rewards.boxed import AnswerTooLong, last_boxed

PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model.ground_truth", "solution")
SUBJECT_COLUMNS = ("subject", "type", "subfield")
STRATUM_COLUMNS = ("stratum", "level", *SUBJECT_COLUMNS)
NO_STRATUM = "all"
"""Stratum of every row of a source without a stratum column."""
UNKNOWN_STRATUM = "unknown"
"""Stratum of a row that lacks the column which the other rows have."""
MAX_BARE_SOLUTION = 64
"""A one-line solution up to this many characters is an answer in itself (the DAPO set is published so)."""

DAPO = "math_dapo"
"""What the original DAPO set writes in ``data_source``. It holds each prompt many times, between the two texts below,
which ask for another form of answer than this package's templates do."""
_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DOLLAR = re.compile(r"(?<!\\)\$")


@dataclass(frozen=True)
class Problem:
    """One problem. ``id`` is dense (0..N-1, in row order), so it is the same in every run on the same data."""

    id: int
    prompt: str
    answer: str
    stratum: str
    level: str = ""
    """Difficulty as its publisher says it, empty where it says nothing."""
    subject: str = ""
    line: int = field(default=0, compare=False)
    """Where its file has it, 1-based; 0 for none."""
    part: int = field(default=0, compare=False)
    """Which set of a mixture it is from."""
    bare: str = field(default="", compare=False)
    """The question alone where the prompt adds to it, such as options; empty where it does not."""


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its line, 1-based (for rows in memory their place), and what is wrong with it."""

    line: int
    reason: str


@dataclass(frozen=True)
class Source:
    """What was loaded."""

    problems: tuple[Problem, ...]
    dropped: tuple[BadRow, ...]
    repeated: int = 0
    """Rows that were left out because they repeat an earlier one."""


def load(
    source: str | Path | Sequence[Mapping[str, object]],
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    stratum_column: str | None = None,
    tolerance_column: str | None = None,
    unit_column: str | None = None,
    on_bad_row: str = "refuse",
) -> Source:
    """Problems of a file, or of rows already in memory.

    Args:
        source: a JSON-lines file (one object a line, blank lines skipped), a parquet file (``.parquet``), either of
            them on the Hugging Face hub as ``hub:OWNER/DATASET/FILE``, or rows.
        prompt_column, answer_column, stratum_column: names of columns, a dot for a nested one
            (``reward_model.ground_truth``); None finds the column by the names that published sets use.
        tolerance_column: a column with the absolute error that a row's numeric answer may have (OlympiadBench's
            ``error``); such an answer reads ``4.2 within 0.1``, which the verifiers understand.
        unit_column: a column with the unit of a row's answer; a number whose unit the verifiers tell from others reads
            ``45\\text{ minute}``.
        on_bad_row: ``refuse`` raises at the first bad row, ``drop`` leaves bad rows out and lists them.

    Raises:
        ValueError: a bad setting.
        DataError: no such file, a column that is nowhere, a bad row under ``refuse``, or no good row at all.
    """
    if on_bad_row not in ("refuse", "drop"):
        raise ValueError(f"on_bad_row: {on_bad_row!r} is not allowed; it must be 'refuse' or 'drop'")
    if isinstance(source, str | Path):
        where, rows = str(source), list(files.rows(str(source)))
    else:
        where, rows = "rows", list(_read_rows(source))
    objects = [row for _, row in rows if not isinstance(row, Bad)]
    if not objects:
        first = f"; line {rows[0][0]} {rows[0][1]}" if rows else ""
        raise DataError(f"{where}: holds no rows; at least one JSON object is needed{first}")
    prompt_key = _column(objects, prompt_column, PROMPT_COLUMNS, "prompt_column", where)
    answer_key = _column(objects, answer_column, ANSWER_COLUMNS, "answer_column", where)
    stratum_key = _stratum_column(objects, stratum_column, where)
    subject_key = next((name for name in SUBJECT_COLUMNS if any(_get(row, name) is not None for row in objects)), None)
    problems: list[Problem] = []
    dropped: list[BadRow] = []
    seen: set[tuple[str, str]] = set()
    repeated = 0
    for line, row in rows:
        try:
            if isinstance(row, Bad):
                raise row
            prompt = _text(row, prompt_key, _prompt)
            answer = _text(row, answer_key, _solution if answer_key == "solution" else _answer)
            if unit_column is not None:
                answer += _unit(answer, _get(row, unit_column))
            if tolerance_column is not None and _get(row, tolerance_column) is not None:
                answer += f" within {_text(row, tolerance_column, _tolerance)}"
            stratum = _stratum(row, stratum_key, required=stratum_column is not None)
            level, subject = _label(row, "level"), _label(row, subject_key)
            if row.get("data_source") == DAPO:
                prompt = _unwrapped(prompt)
                if (prompt, answer) in seen:
                    repeated += 1
                    continue
                seen.add((prompt, answer))
        except Bad as bad:
            if on_bad_row == "refuse":
                raise DataError(f"{where}, line {line}: {bad}") from None
            dropped.append(BadRow(line, str(bad)))
        else:
            problems.append(Problem(len(problems), prompt, answer, stratum, level, subject, line))
    if not problems:
        raise DataError(f"{where}: none of its {len(rows)} rows is usable; line {dropped[0].line}: {dropped[0].reason}")
    return Source(tuple(problems), tuple(dropped), repeated)


def _read_rows(rows: Sequence[object]) -> Iterator[tuple[int, Mapping[str, object] | Bad]]:
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, Mapping) else Bad(f"is {show(row)}; a mapping is needed")


# Columns ------------------------------------------------------------------------------------------------------------
def _get(row: Mapping[str, object], column: str) -> object:
    """Value of a column, nested where the name has dots; None where absent."""
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _column(
    rows: Sequence[Mapping[str, object]], asked: str | None, known: tuple[str, ...], field: str, where: str
) -> str:
    candidates = known if asked is None else (asked,)
    for column in candidates:
        if any(_get(row, column) is not None for row in rows):
            return column
    columns = sorted({str(name) for row in rows for name in row})
    if asked is None:
        raise DataError(f"{where}: none of {', '.join(known)} is a column; name one of {_list(columns)} as {field}")
    close = get_close_matches(asked, columns, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"{where}: {field}: there is no column {asked!r}; it must be one of {_list(columns)}{hint}")


def _stratum_column(rows: Sequence[Mapping[str, object]], asked: str | None, where: str) -> str | None:
    if asked is not None:
        return _column(rows, asked, STRATUM_COLUMNS, "stratum_column", where)
    return next((name for name in STRATUM_COLUMNS if any(_get(row, name) is not None for row in rows)), None)


# Values -------------------------------------------------------------------------------------------------------------
def _prompt(value: object) -> str:
    if isinstance(value, list):  # a conversation, as some sets are published
        value = _conversation(value)
    if not isinstance(value, str) or not value.strip():
        raise Bad(f"is {show(value)}; a non-empty string is needed")
    return _encodable(value)


def _conversation(turns: Sequence[object]) -> object:
    """The text of a user's turn, behind the system's if there is one; the turns themselves if they are others."""
    said = [(turn.get("role"), turn.get("content")) for turn in turns if isinstance(turn, dict)]
    texts = [text for _, text in said if isinstance(text, str)]
    if len(texts) != len(turns) or (len(texts) > 1 and [role for role, _ in said] != ["system", "user"]):
        return turns
    return "\n\n".join(texts)


def _unwrapped(prompt: str) -> str:
    text = prompt.strip()
    wrapped = text.startswith(_BEFORE) and text.endswith(_AFTER)
    return text[len(_BEFORE) : -len(_AFTER)].strip() if wrapped else prompt


def _answer(value: object) -> str:
    """The plain answer behind any of the published forms."""
    if isinstance(value, list | tuple):
        if not value:
            raise Bad("is an empty list; at least one answer is needed")
        return ", ".join(_answer(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if not isinstance(value, str):
        raise Bad(f"is {show(value)}; a string, a finite number or a list of them is needed")
    text = _plain(value)
    if not text:
        raise Bad(f"is {show(value)}, which holds no answer; a non-empty answer is needed")
    return _encodable(text)


def _plain(text: str) -> str:
    if "####" in text:
        final = text.rpartition("####")[2].strip()
        return final.replace(",", "") if _THOUSANDS.fullmatch(final) else final
    try:
        boxed = last_boxed(text)
    except AnswerTooLong as error:
        raise Bad(f"is {show(text)}: {error}") from None
    answer = (text if boxed is None else boxed).strip()
    return _DOLLAR.sub("", answer).strip() if len(_DOLLAR.findall(answer)) % 2 == 0 else answer


def _solution(value: object) -> str:
    """The answer in a worked solution, or a short bare answer in a column of that name."""
    if isinstance(value, str) and "\\boxed" not in value and "####" not in value:
        text = value.strip()
        if len(text) > MAX_BARE_SOLUTION or "\n" in text:
            raise Bad(f"is {show(value)}, which has no \\boxed{{}} answer; one is needed")
    return _answer(value)


def _text(row: Mapping[str, object], column: str, convert: Callable[[object], str]) -> str:
    """A converted value; what is wrong with it names the column."""
    value = _get(row, column)
    if value is None:
        raise Bad(f"column {column!r} is {'null' if column in row else 'missing'}; every row needs one")
    try:
        return convert(value)
    except Bad as bad:
        raise Bad(f"column {column!r} {bad}") from None


def _stratum(row: Mapping[str, object], column: str | None, *, required: bool) -> str:
    if column is None:
        return NO_STRATUM
    value = _get(row, column)
    if value is None and not required:
        return UNKNOWN_STRATUM
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        number = str(int(value)) if float(value).is_integer() else repr(value)
        return f"Level {number}" if column == "level" else number
    if isinstance(value, str) and value.strip():
        return _encodable(value.strip())
    raise Bad(f"column {column!r} is {show(value)}; a non-empty string or a number is needed")


def _label(row: Mapping[str, object], column: str | None) -> str:
    """Level or subject, empty where there is none: never a reason to refuse a row."""
    try:
        label = _stratum(row, column, required=False)
    except Bad:
        return ""
    return "" if label in (NO_STRATUM, UNKNOWN_STRATUM) else label


def _unit(answer: str, value: object) -> str:
    unit = value.replace("$", "").strip() if isinstance(value, str) else ""
    known = units.read(unit) is not None and plain_numbers.read(answer, units=False) is not None
    return f"\\text{{ {unit}}}" if known else ""


def _tolerance(value: object) -> str:
    try:
        error = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        error = math.nan
    if not 0.0 <= error < math.inf:
        raise Bad(f"is {show(value)}; a number of 0 or above is needed")
    return repr(error)


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Bad("holds half of a surrogate pair; valid Unicode is needed") from None
    return text


def _list(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:20])
    return shown if len(columns) <= 20 else f"{shown}, ..."
