"""What is drawn and when a row stops."""

import dataclasses

from gdro_jax.models.paged import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are sampled.

    Attributes:
      max_new_tokens: most tokens of a response, its stop token included.
      temperature: divides the logits; 0 is greedy.
      top_p: keep the smallest set of tokens whose probability reaches this; 1.0 keeps all.
      top_k: keep this many most likely tokens; 0 keeps all.
      min_p: keep tokens at least this share as likely as the likeliest; 0.0 keeps all.
      stop_tokens: ids that end a row; the stop token itself belongs to the response.
      min_new_tokens: fewest tokens of a response, its stop token included: no stop token is drawn before.
      slots: most rows decoded at a time; a waiting row enters a slot at the step its last row ended. None for all at
        once.
      segment: most tokens a row is decoded between two looks of the host, which hands over finished rows, reports
        progress and heeds an interrupt there.
      cache_dtype: of keys and values while they are kept: `bfloat16`, or `int8` with a scale for each vector; None for
        the model's own. Less memory for log-probs that are a little off the trainer's.
      cache: how keys and values lie: `contiguous`, as long in every slot, with prompts read by several slots at a
        time; `paged`, as many pages as a row has tokens; `auto`, `paged` on a TPU where its kernel can run, else
        `contiguous`. Off a TPU pages are read by plain JAX, slowly.
      page_tokens: tokens of a page; a row's last page is half empty on average, and so is its prompt's.
      cache_tokens: tokens of a response that there are pages for in every slot at first, one may have more where
        another has less; about what rows hold at once, at most. When they hold more there is room for twice as many,
        then for the longest. None for 3/16 of the longest. Of pages only.

    Raises:
      ValueError: naming the field, the value and what is allowed.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 1
    slots: int | None = None
    segment: int = 32
    cache_dtype: str | None = None
    cache: str = "auto"
    page_tokens: int = 64
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))  # lists cannot be hashed
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or above, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or above")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must be in 0..1; 0 keeps all")
        if not 1 <= self.min_new_tokens <= self.max_new_tokens:
            allowed = f"must be in 1..max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"min_new_tokens={self.min_new_tokens}: {allowed}")
        if self.segment < 1:
            raise ValueError(f"segment={self.segment}: must be at least 1")
        if any(t < 0 for t in self.stop_tokens):
            raise ValueError(f"stop_tokens={self.stop_tokens}: ids must be 0 or above")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots={self.slots}: must be at least 1, or None for all rows at once")
        if self.cache_dtype not in (None, "bfloat16", "int8"):
            raise ValueError(f"cache_dtype={self.cache_dtype!r}: must be bfloat16 or int8, or None for the model's own")

        if self.cache not in KINDS:
            raise ValueError(f"cache={self.cache!r}: must be one of {', '.join(KINDS)}")
        if self.cache == "paged" and self.cache_dtype == "int8":
            raise ValueError("cache='paged': must be auto or contiguous with cache_dtype=int8, pages have no scales")
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens={self.page_tokens}: must be at least 1")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise ValueError(f"cache_tokens={self.cache_tokens}: must be at least 1, or None for 3/16 of the longest")
        if self.cache_tokens is not None and self.cache == "contiguous":
            raise ValueError(f"cache_tokens={self.cache_tokens}: must be None with cache=contiguous, it is of pages")

    @property
    def truncates(self) -> bool:
        """Whether anything is cut off, so that what is sampled from differs from the policy at the temperature."""
        short = self.min_new_tokens > 1 and bool(self.stop_tokens)
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0 or short
