"""Samples a policy on a set of problems and grades what it says: the counts behind mean@k and pass@k."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gdro_jax.data.prompts import Prompts
from gdro_jax.rewards import Grading
from gdro_jax.sampling import Rollouts, Sampler


class Counts(NamedTuple):
    """Grades of N problems.

    Attributes:
      correct: int64[N] right responses.
      scorable: int64[N] responses that could be graded.
      tokens: generated tokens in all.
      clipped: share of responses that reached the length limit.
    """

    correct: np.ndarray
    scorable: np.ndarray
    tokens: int
    clipped: float


class Graded(NamedTuple):
    """One graded response: problem id, rank among the problem's, text, score 1.0 or 0.0, whether it could be graded,
    whether it ended before the length limit, generated tokens, and why it could not be graded."""

    problem: int
    rank: int
    response: str
    score: float
    scorable: bool
    finished: bool
    tokens: int = 0
    reason: str | None = None


def texts(rollouts: Rollouts, tokenizer, stop_tokens: Sequence[int]) -> list[str]:
    """The responses as text, without their stop token."""
    tokens, mask, stops = np.asarray(rollouts.tokens), np.asarray(rollouts.mask), set(stop_tokens)
    ids = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    ids = [row[:-1] if row and row[-1] in stops else row for row in ids]
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def responses(
    sampler: Sampler,
    prompts: Prompts,
    tokenizer,
    verifier: Grading,
    key: jax.Array,
    samples: int,
    prompt_length: int,
    problems_per_call: int = 256,
) -> Iterator[tuple[list[Graded], int]]:
    """Graded responses, one batch of problems at a time, and each batch's generated tokens.

    Every call has the same shapes (the last batch is filled up), so one program is compiled. A response depends on the
    key, its problem and its rank alone.
    """
    size = min(problems_per_call, len(prompts.problems))
    for start in range(0, len(prompts.problems), size):
        batch = range(start, min(start + size, len(prompts.problems)))
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        index = np.repeat(np.arange(size), samples)
        out = sampler(
            [prompts.tokens[i] for i in filled], index, key, [prompts.problems[i].id for i in filled], prompt_length
        )
        said = texts(out, tokenizer, sampler.config.stop_tokens)[: len(batch) * samples]
        finished, lengths = np.asarray(out.finished), np.asarray(out.mask)[: len(said)].sum(axis=1)
        owners = [prompts.problems[i] for i in batch for _ in range(samples)]
        grades = verifier.grade(said, [p.answer for p in owners])
        rows = [
            Graded(
                problem=p.id,
                rank=i % samples,
                response=said[i],
                score=float(grades.scores[i]),
                scorable=bool(grades.scorable[i]),
                finished=bool(finished[i]),
                tokens=int(lengths[i]),
                reason=grades.reasons.get(i),
            )
            for i, p in enumerate(owners)
        ]
        yield rows, int(lengths.sum())


def count(batches: Iterator[tuple[list[Graded], int]], num_problems: int) -> Counts:
    """Adds graded responses up; problem ids are 0..num_problems - 1."""
    correct, scorable = np.zeros(num_problems, np.int64), np.zeros(num_problems, np.int64)
    tokens = total = clipped = 0
    for rows, generated in batches:
        tokens += generated
        for row in rows:
            correct[row.problem] += row.scorable and row.score > 0
            scorable[row.problem] += row.scorable
            clipped += not row.finished
            total += 1
    return Counts(correct, scorable, tokens, clipped / max(total, 1))
