"""A worker of a verifier: a program run by path, so that it imports math-verify and nothing of this package.

Reads one JSON request a line from standard input, ``{"id", "gold", "given"}``, and answers each with one line on the
original standard output, ``{"id", "verdict"}``, where the verdict is true, false, or a string that says why the row is
unscorable. Where ``given`` is null the question is whether the gold answer can be used. It has no deadline of its own:
the parent kills it. Its memory and its processor time are limited.

``{"ready": true}`` says that requests are answered. Those for math-verify are answered by a copy of the process, whose
id is in ``copy``: when that is killed, a second's imports are not done again. ``{"ended": code, "busy": ...}`` says
that it is gone, and whether it had begun a request; then the next copy is ready.
"""

import gc
import importlib
import json
import logging
import math
import mmap
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any

RECURSION_LIMIT = 3000
LARGEST_FILE = 1 << 20  # bytes that a worker may write to any one file
MOST_SAID = 200  # characters of an error's text that are passed on

_WORD = re.compile(r"[^\W\d_]{2,}|\\(?:text|textbf|mathrm|mbox)\{[^{}]*[^\W\d_][^{}]*\}")
_PROSE = re.compile(r"(?=.*[A-Za-z]{2} +(?!or |and )[A-Za-z]{2})[\w ,.;:?!'-]*")
_WITHIN = re.compile(r"(.+) within ([0-9.e+-]+)")


def main() -> None:
    """Answer requests until standard input ends.

    Arguments: memory limit in MiB, seconds of deadline of one row, and, where it is not math-verify that grades, the
    function that does, as `package.module:function`.
    """
    memory_mb, timeout = int(sys.argv[1]), float(sys.argv[2])
    with os.fdopen(os.dup(1), "wb", buffering=0) as replies:
        os.dup2(2, 1)  # whatever a library prints cannot be taken for a reply
        logging.disable(logging.CRITICAL)
        grader: _Grader | _Function
        if len(sys.argv) > 3:
            grader = _Function(sys.argv[3])
        else:
            grader = _Grader()
            grader.verdict("\\frac{1}{2}", "x + 1")  # what is imported at first use is not the first row's to pay
        sys.setrecursionlimit(RECURSION_LIMIT)
        busy = mmap.mmap(-1, 1)  # 1 while a request is answered; shared with the copies
        copied = isinstance(grader, _Grader) and _one_thread()
        if copied and not _is_copy(replies, busy):
            return
        _limit(resource.RLIMIT_AS, memory_mb << 20)
        _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
        _limit(resource.RLIMIT_CORE, 0)
        if not copied:
            replies.write(b'{"ready": true}\n')
        _hush()
        for line in sys.stdin.buffer:
            busy[0] = 1
            request = json.loads(line)
            # Backstop for a worker whose parent is gone: it dies of its own processor time.
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + 2 * timeout) + 1)
            verdict = grader.verdict(request["gold"], request["given"])
            replies.write(json.dumps({"id": request["id"], "verdict": verdict}).encode() + b"\n")
            busy[0] = 0


def _one_thread() -> bool:
    """Whether a copy of this process would be whole; false where that cannot be told."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _is_copy(replies: IO[bytes], busy: mmap.mmap) -> bool:
    """Copies this process, again when the copy is gone; true in a copy, false once the input of one has ended."""
    gc.collect()
    gc.freeze()  # or a collection would write to every page that they share
    while True:
        busy[0] = 0
        copy = os.fork()
        if not copy:
            return True
        replies.write(json.dumps({"ready": True, "copy": copy}).encode() + b"\n")
        code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        if not code:
            return False
        replies.write(json.dumps({"ended": code, "busy": bool(busy[0])}).encode() + b"\n")


def _hush() -> None:
    """From here on what is printed goes nowhere: there is no end to what a function may print, and a limit on files."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _limit(which: int, value: int) -> None:
    """Set a soft limit, as far as the hard one and the platform allow."""
    hard = resource.getrlimit(which)[1]
    try:
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except (ValueError, OSError):  # a platform without this limit; the parent's deadline still holds
        return


class _Function:
    """A function of the user's: `function(response, answer)` is True, False, or None for unscorable."""

    def __init__(self, path: str) -> None:
        sys.path.insert(0, os.getcwd())
        module, _, name = path.partition(":")
        self._function = getattr(importlib.import_module(module), name)

    def verdict(self, gold: str, given: str) -> bool | str:
        try:
            verdict = self._function(given, gold)
        except Exception as error:  # whatever a function that is not ours raises costs this row alone
            said = " ".join(str(error).split())[:MOST_SAID]
            return f"the verifier function raised {type(error).__name__}" + (f": {said}" if said else "")
        if verdict is None:
            return "the verifier function gave no verdict"
        if verdict in (True, False):
            return bool(verdict)
        return f"the verifier function returned a {type(verdict).__name__} that is neither true nor false"


class _Grader:
    """math-verify without its alarms. It takes any error for "not equal"; the two that mean "gave up" are noted."""

    def __init__(self) -> None:
        parser: Any = importlib.import_module("math_verify.parser")
        grader: Any = importlib.import_module("math_verify.grader")
        self._parse_text = parser.parse
        self._equal = grader.verify
        self._gave_up = ""
        parser.latex2sympy = self._noting(parser.latex2sympy)
        grader.sympy_expr_eq = self._noting(grader.sympy_expr_eq)
        grader.safe_sympy_doit = self._done  # its own takes exhausted memory for "cannot be simplified"
        self._gold = lru_cache(maxsize=4096)(self._parse)
        self._fault = lru_cache(maxsize=4096)(self._fault_of)

    def verdict(self, gold: str, given: str | None) -> bool | str:
        self._gave_up = ""
        fault = self._fault(gold)
        if fault:
            return fault
        if given is None:
            return True
        near = _WITHIN.fullmatch(gold)
        found = self._parse(given)
        if self._near(near, found) if near else self._equal(self._gold(gold), found, timeout_seconds=None):
            return True
        return self._gave_up or False

    def _fault_of(self, gold: str) -> str:
        """Why a gold answer cannot be used, empty where it can: text that is no mathematics equals itself too."""
        near = _WITHIN.fullmatch(gold)
        text = near[1] if near else gold
        meant = [it for it in self._gold(text) if not isinstance(it, str)]
        if near:
            return "" if self._near(near, meant) else self._gave_up or "the gold answer is not a number"
        if not meant:
            return "" if _WORD.fullmatch(text) else self._gave_up or "the gold answer does not parse"
        if str(meant[0]) in ("zoo", "nan"):
            return "the gold answer has no value"
        if _PROSE.fullmatch(text) and _number(meant) is None:
            return "the gold answer is prose; words that are an answer stand in \\text{}"
        if self._equal(meant, meant, timeout_seconds=None):
            return ""
        return self._gave_up or "the gold answer does not equal itself"

    def _near(self, wanted: "re.Match[str]", found: list[object]) -> bool:
        """Whether a number is as near to the gold one as that allows."""
        try:
            allowed = float(wanted[2])
        except ValueError:
            return False
        number, given = _number(self._gold(wanted[1])), _number(found)
        return number is not None and given is not None and abs(number - given) <= allowed + 1e-9 * abs(number)

    def _parse(self, text: str) -> list[object]:
        return list(self._parse_text(f"\\boxed{{{text}}}", parsing_timeout=None))

    def _done(self, expression: Any) -> object:
        try:
            return expression.doit()
        except (MemoryError, RecursionError) as error:
            self._gave_up = f"math-verify gave up: {type(error).__name__}"
        except Exception:  # whatever sympy raises, the expression stays as it is
            pass
        return expression

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: object, **kwargs: object) -> object:
            try:
                return function(*args, **kwargs)
            except (MemoryError, RecursionError) as error:
                self._gave_up = f"math-verify gave up: {type(error).__name__}"
                raise

        return noting


def _number(parsed: list[object]) -> float | None:
    """The real number that an answer is, of an equation its right side; None for anything else."""
    for it in parsed:
        value: Any = getattr(it, "rhs", it)
        if getattr(value, "is_number", False):
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):  # not real
                return None
    return None


if __name__ == "__main__":
    main()
