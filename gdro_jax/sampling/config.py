"""What is drawn and when a row stops."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled.

    Attributes:
      max_new_tokens: most tokens of a response, its stop token included.
      temperature: divides the logits; 0 is greedy.
      top_p: keep the smallest set of tokens whose probability reaches this; 1.0 keeps all.
      top_k: keep this many most likely tokens; 0 keeps all.
      stop_tokens: ids that end a row; the stop token itself belongs to the response.
      slots: most rows decoded at a time, None for all at once.

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_tokens: tuple[int, ...] = ()
    slots: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or above, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or above")
        if any(t < 0 for t in self.stop_tokens):
            raise ValueError(f"stop_tokens={self.stop_tokens}: ids must be 0 or above")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots={self.slots}: must be at least 1, or None for all rows at once")

    @property
    def truncates(self) -> bool:
        """Whether the distribution sampled from differs from the policy itself."""
        return self.temperature != 1.0 or self.top_p < 1.0 or self.top_k > 0
