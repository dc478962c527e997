r"""Spellings that math-verify takes for nothing or for something else: made plain or told apart before that."""

import re
from itertools import pairwise

from gdro_jax.rewards import plain_numbers

NO_ANSWERS = frozenset({"todo", "tbd", "tba", "fixme", "n/a", "na", "null", "nan", "missing", "placeholder", "unknown"})
"""What stands where an answer should, in any case, bare or in ``\\text{}``; so does a bare ``None``."""
CHAIN = 0.01
"""Relative difference at which the numbers of ``x=1/3=0.333`` still are one."""

TEXT_MACRO = r"\\(?:text|textbf|mathrm|mbox)"
"""Pattern of the commands that set words within mathematics."""

_TEXT = re.compile(TEXT_MACRO + r"\{\s*([^{}]*?)\s*\}")
_NUMPY = re.compile(
    r"(?<![A-Za-z0-9.\\])(?:np|numpy)\.(arcsin|arccos|arctan|sin|cos|tan|exp|log|sqrt|pi)(?![A-Za-z0-9])"
)
_NUMPY_NAMES = {"log": "\\ln", "sqrt": "sqrt"}
_SEPARATED = re.compile(r"(?<![0-9.,}])[1-9][0-9]{0,2}(?:(?:,\\!\s?|\{,\}|\\!)[0-9]{3})+(?![0-9])")
_POINT = re.compile(r"(?<![0-9.])([0-9]+)\.(?=\s*[/*)])")
_EXTREME = re.compile(r"_\{\s*\\(max|min)\s*\}")
_SUBSCRIPTED_E = re.compile(r"(?<![A-Za-z\\])E_(?:\{([A-Za-z0-9]+)\}|([A-Za-z0-9]))")  # E is Euler's number there
_SPACED = re.compile(r"[+-]?[0-9]+(?:(?:\s|\\[,;:! ]|~)+[0-9]+)+")
_SPACE = re.compile(r"(?:\s|\\[,;:! ]|~)+")
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:(?:\s|\\[,;:! ]|~)[0-9]{3})+")
_RELATION = re.compile(
    r"\s*(<=?|>=?|!=|[\u2264\u2265\u2260\u00ac]"
    r"|\\(?:lt|gt|[lg]eq?|[lg]eqslant|[lg]eqq|lesssim|gtrsim|neq?|not|notin|neg|lnot)(?![A-Za-z]))"
)
_RELATIONS = {
    name: relation
    for relation, names in {
        "<": "\\lt",
        ">": "\\gt",
        "<=": "\\le \\leq \\leqslant \\leqq \u2264",
        ">=": "\\ge \\geq \\geqslant \\geqq \u2265",
        "!=": "\\ne \\neq \u2260",
        "not": "\\neg \\lnot \u00ac",
    }.items()
    for name in names.split()
}
_EQUALS = re.compile(r"(?<![<>!:\\=])=(?!=)")


def plain(text: str) -> str:
    r"""The same answer as math-verify can read it: ``1,\!234``, ``np.arcsin(x)``, ``1./3``, ``m_{\max }``."""
    text = _SEPARATED.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)
    text = _NUMPY.sub(lambda match: _NUMPY_NAMES.get(match[1], f"\\{match[1]}"), text)
    text = _EXTREME.sub(r"_{\1}", _POINT.sub(r"\1", text))
    text = _SUBSCRIPTED_E.sub(lambda match: f"\\Xi_{{{match[1] or match[2]}}}", text)
    return _SPACE.sub("", text) if _GROUPED.fullmatch(text) else text


def is_no_answer(gold: str) -> bool:
    """Whether a gold answer is a mark that there is none."""
    match = _TEXT.fullmatch(gold)
    return (gold if match is None else match[1]).casefold() in NO_ANSWERS or gold == "None"


def relation(text: str) -> str:
    r"""What stands before an answer that is no value, as in ``> 5`` and ``\neq 5``, which math-verify reads as 5."""
    match = _RELATION.match(text)
    return "" if match is None or text.rstrip().endswith(">") else _RELATIONS.get(match[1], match[1])


def differ(gold: str, given: str) -> bool:
    r"""Whether two plain answers cannot be the same, though math-verify says so: ``4 5`` and 9, a set and a tuple."""
    if _SPACED.fullmatch(given) or _SPACED.fullmatch(gold):
        return _SPACE.split(given) != _SPACE.split(gold)
    return {_enclosed(gold), _enclosed(given)} == {"{", "("} or _contradicts_itself(given)


def _enclosed(text: str) -> str:
    """The bracket around a whole answer of several parts, ``{`` or ``(``, empty where there is none."""
    text = text.replace("\\left", "").replace("\\right", "").strip()
    if "," not in text:
        return ""
    if text.startswith("\\{") and text.endswith("\\}") and text.count("\\{") == 1:
        return "{"
    if not (text.startswith("(") and text.endswith(")")):
        return ""
    depth = 0
    for char in text[:-1]:
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return ""
    return "("


def _contradicts_itself(text: str) -> bool:
    """Whether it is a chain of equations between unlike numbers, ``x=6=5``."""
    parts = [part for part in _EQUALS.split(text) if "%" not in part]
    numbers = [number for part in parts if (number := plain_numbers.read(part, units=False)) is not None]
    return any(abs(a - b) > CHAIN * max(abs(a), abs(b)) for a, b in pairwise(numbers))
