"""What a run has spent. Comparisons refuse unequal rollouts and report all of it."""

import dataclasses
import time


@dataclasses.dataclass
class Ledger:
    """Totals so far.

    Attributes:
      rollouts: training responses sampled.
      tokens: tokens generated for them.
      scored: of these responses, how many the verifier could grade.
      slot_steps: row positions decoded, useful or idle; tokens / slot_steps is the useful share.
      eval_rollouts: responses sampled for evaluation, not part of the training budget.
      seconds: wall clock of training steps without compilation; compile_seconds: of compilation in them;
        eval_seconds: of evaluations.
      prompts: training prompts consumed, the position in the data order.
    """

    rollouts: int = 0
    tokens: int = 0
    scored: int = 0
    slot_steps: int = 0
    eval_rollouts: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    eval_seconds: float = 0.0
    prompts: int = 0


class Clock:
    """Wall-clock seconds of a step's phases."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Books the time since the last lap under `phase`."""
        now = time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self._begun
