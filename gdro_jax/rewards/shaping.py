r"""What may be added to a verifier's grade before advantages are taken: a penalty for length, a word for the format.

Controllers and evaluations never see it: they count right and wrong answers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdro_jax.rewards.boxed import AnswerTooLong, last_boxed


def soft_overlong(lengths: ArrayLike, max_length: int, buffer: int) -> NDArray[np.float32]:
    """Soft overlong punishment of DAPO (Yu et al., arXiv 2503.14476, Eq. 13).

    Args:
        lengths: int[R], generated tokens.
        max_length: the length limit L_max.
        buffer: the last L_cache tokens before it, 1 to max_length, over which the penalty grows from 0 to -1.

    Returns:
        float32[R], in -1..0; responses cut off at the limit get -1.

    Raises:
        ValueError: buffer outside 1..max_length.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer: {buffer!r} is not allowed; it must be in 1..max_length={max_length}")
    over = np.asarray(lengths, dtype=np.float32) - (max_length - buffer)
    return -np.clip(over / buffer, 0.0, 1.0).astype(np.float32)


def has_box(responses: Sequence[str]) -> NDArray[np.float32]:
    r"""float32[R], 1.0 where a response holds a complete ``\boxed{...}`` that is not empty and not too long."""
    return np.array([_has_box(response) for response in responses], dtype=np.float32)


def shaped(
    scores: NDArray[np.float32],
    lengths: ArrayLike,
    responses: Sequence[str],
    *,
    max_length: int,
    overlong_buffer: int | None,
    overlong_penalty: float,
    format_reward: float | None,
) -> NDArray[np.float32]:
    """Scores float32[R] with what is asked for added; the very scores where nothing is."""
    out: NDArray[np.floating] = scores
    if overlong_buffer is not None:
        out = out + overlong_penalty * soft_overlong(lengths, max_length, overlong_buffer)
    if format_reward is not None:
        out = out + format_reward * has_box(responses)
    return out.astype(np.float32)


def _has_box(response: str) -> bool:
    try:
        return bool((last_boxed(response) or "").strip())
    except AnswerTooLong:
        return False
