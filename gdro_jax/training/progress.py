"""Live progress of a run: one line that redraws itself on a terminal, a line every few steps elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from gdro_jax import sampling

_BARS = " ▁▂▃▄▅▆▇█"
_SECONDS_LIVE, _SECONDS = 1.0, 60.0  # least time between two looks at one step's sampling, on a terminal and elsewhere


class Progress:
    """Prints records as they come.

    Args:
      label: of the run.
      steps: of the whole run; done: already made before (a resumed run).
      every: steps between lines where the stream is not a terminal.
      stream: standard error by default.
    """

    def __init__(self, label: str, steps: int, done: int, every: int, stream: TextIO | None = None):
        self.label, self.steps, self.done, self.every = label, steps, done, every
        self.stream = stream or sys.stderr
        self.begun, self._compiled = time.perf_counter(), False
        self.live = self.stream.isatty()
        self._sampling: tuple[int, float, int] | None = None  # step, and the time and tokens at its first look
        self._looked, self._tokens = self.begun, 0  # of the last look shown, and of the last one

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Shows one record."""
        step = record["step"]
        if record.get("unexpected_compiles"):
            self._show(
                f"{self.label}  step {step}: programs compiled again: {record['unexpected_compiles']}", stay=True
            )
        if "reward" in record and (self.live or step % self.every == 0 or step == self.steps):
            self._show(self._line(record), stay=not self.live or step == self.steps)
        if "reward" in record and not self._compiled:  # the first step compiles: the others tell how long a step is
            self.begun, self.done, self._compiled = time.perf_counter(), step, True
        if "eval" in record:
            self._show(f"{self.label}  step {step:>4}/{self.steps}  {_evaluation(record['eval'])}", stay=True)

    def sampled(self, step: int, seen: sampling.Progress) -> None:
        """Shows how far the sampling of a step or an evaluation is, now and then: nothing where it is soon done."""
        now = time.perf_counter()
        if self._sampling is None or self._sampling[0] != step or seen.tokens < self._tokens:  # another call
            self._sampling, self._looked = (step, now, seen.tokens), now
        self._tokens = seen.tokens
        if now - self._looked < (_SECONDS_LIVE if self.live else _SECONDS):
            return
        self._looked, (_, begun, before) = now, self._sampling
        text = f"{self.label}  step {step:>4}/{self.steps}  sampling: {seen.done:,} of {seen.total:,} rows"
        rate = (seen.tokens - before) / (now - begun)
        self._show(f"{text}  {seen.tokens:,} tokens  {rate:,.0f} tokens/s", stay=not self.live)

    def _line(self, record: Mapping[str, Any]) -> str:
        step, bins = record["step"], record["bins"]
        left = (time.perf_counter() - self.begun) / max(step - self.done, 1) * (self.steps - step)
        reward = record["reward"]
        parts = [
            f"{self.label}  step {step:>4}/{self.steps}",
            f"reward {reward:.3f}" if reward is not None else "reward  -",
            f"bins (hard to easy) {sparkline(bins['share'])}",
            f"weights {sparkline(bins['weight'])}",
            f"rollouts {' '.join('-' if math.isnan(n) else f'{n:.1f}' for n in bins['rollouts'])}",
            f"{record['ledger']['tokens']:,} tokens",
            f"{_clock(left)} left",
        ]
        return "  ".join(parts)

    def _show(self, text: str, stay: bool) -> None:
        self.stream.write(("\r\x1b[2K" if self.live else "") + text + ("\n" if stay else ""))
        self.stream.flush()


def sparkline(values: Any) -> str:
    """One block character per value, scaled to the largest; a dot for what is not a number."""
    known = [v for v in values if not math.isnan(v)]
    top = max(known, default=0.0)
    return "".join("·" if math.isnan(v) else _BARS[round(8 * v / top) if top > 0 else 0] for v in values)


def _evaluation(summary: Mapping[str, Any]) -> str:
    overall, worst = summary["overall"], summary["worst"]
    passed = "-" if overall["pass"] is None else f"{overall['pass']:.3f}"
    return (
        f"held out, {overall['n']:,} problems: mean@1 {overall['mean']:.3f}  pass@{summary['k']} {passed}  "
        f"worst stratum {worst['stratum']} {worst['mean']:.3f}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
