r"""Finding the last ``\boxed{...}`` of a text in time linear in its length, whatever the text is."""

import re

MAX_ANSWER_CHARS = 2000
"""Longest boxed answer that is looked at."""
MAX_UNCLOSED = 64
"""How many unfinished boxes at the end of a text are stepped over before giving up."""

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_OPENING = re.compile(r"\\boxed\s{0,8}\{")


class AnswerTooLong(ValueError):
    """The last box is longer than ``MAX_ANSWER_CHARS``, or is hidden behind too many unfinished ones."""


def last_boxed(text: str, limit: int = MAX_ANSWER_CHARS) -> str | None:
    r"""Content of the last complete ``\boxed{...}``, braces balanced (``\{``, ``\}`` do not count); None if none.

    A box cut off by the end of the text holds no answer, so the one before it counts; of nested boxes, the inner one.

    Raises:
        AnswerTooLong: the last box does not close within ``limit`` characters.
    """
    end = len(text)
    for _ in range(MAX_UNCLOSED):
        start = text.rfind("\\boxed", 0, end)
        if start < 0:
            return None
        end = start
        opening = _OPENING.match(text, start)
        if opening is None:
            continue
        begin = opening.end()
        stop = begin + limit + 1
        close = _closing(text, begin, stop)
        if close is not None:
            return text[begin:close]
        if stop < len(text):
            raise AnswerTooLong(f"the last boxed answer does not close within {limit} characters")
    raise AnswerTooLong(f"more than {MAX_UNCLOSED} unfinished boxes at the end of the text")


def nesting_depth(text: str) -> int:
    """Deepest level of open brackets of any kind, a lower bound of what a recursive parser has to descend."""
    depth = deepest = 0
    for char in text:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
    return deepest


def _closing(text: str, begin: int, stop: int) -> int | None:
    """Index of the brace that closes the one just before ``begin``, or None if there is none before ``stop``."""
    depth = 1
    for match in _BRACE.finditer(text, begin, stop):
        token = match.group()
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None
