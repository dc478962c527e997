"""Samples a policy on a set of problems and grades what it says: the counts behind mean@k and pass@k."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple

import jax
import numpy as np

from gdro_jax.data.prompts import Prompts, pad
from gdro_jax.data.sources import Problem
from gdro_jax.rewards import Grading
from gdro_jax.sampling import Progress, Rollouts, Sampler, empty


class Counts(NamedTuple):
    """Grades of N problems.

    Attributes:
      correct: int64[N] right responses.
      scorable: int64[N] responses that could be graded.
      tokens: generated tokens in all.
      clipped: share of responses that reached the length limit.
      responses: how many there are.
      failures: why, for each that could not be graded.
    """

    correct: np.ndarray
    scorable: np.ndarray
    tokens: int
    clipped: float
    responses: int
    failures: list[str | None]


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
    *,
    kept: Set[tuple[int, int]] = frozenset(),
    as_they_finish: bool = False,
    watch: Callable[[Progress], None] = lambda look: None,
) -> Iterator[tuple[list[Graded], int]]:
    """Graded responses, one batch of problems at a time, and the tokens generated for them.

    Every call has the same shapes (the last batch is filled up), so one program is compiled. A response depends on the
    key, its problem and its rank alone.

    Args:
      kept: problem and rank of responses that are there already: the others of the problem keep their ranks.
      as_they_finish: a part of a batch at every look at the sampler, graded while the others are decoded; a part may
        be empty.
      watch: told of every look at the sampler; what it raises ends everything.
    """
    todo = [
        place for place, it in enumerate(prompts.problems) if any((it.id, rank) not in kept for rank in range(samples))
    ]
    size = min(problems_per_call, len(todo))
    index = np.repeat(np.arange(size, dtype=np.int32), samples)
    for start in range(0, len(todo), size or 1):
        batch = todo[start : start + size]
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        owners = [prompts.problems[place] for place in filled for _ in range(samples)]
        wanted = np.array([(it.id, row % samples) not in kept for row, it in enumerate(owners)])
        wanted[len(batch) * samples :] = False
        longest = sampler.config.max_new_tokens
        out = empty(len(owners), longest)
        looks = sampler.stream(
            out,
            *pad([prompts.tokens[place] for place in filled], prompt_length),
            index,
            np.array([it.id for it in owners], np.uint32),
            key,
            np.where(wanted, longest, 1).astype(np.int32),  # of the rest a token is drawn and forgotten
        )
        parts: Iterable[np.ndarray] = (np.sort(look.rows[wanted[look.rows]]) for look in _watched(looks, watch))
        if not as_they_finish:
            parts = [np.sort(np.concatenate(list(parts)))]
        for rows in parts:
            if not rows.size:
                yield [], 0
                continue
            said = texts(Rollouts(*(x[rows] for x in out)), tokenizer, sampler.config.stop_tokens)
            ranked = [(owners[row], row % samples) for row in rows.tolist()]
            yield _graded(ranked, said, out.finished[rows], out.mask[rows].sum(axis=1), verifier)


def _watched(looks: Iterator[Progress], watch: Callable[[Progress], None]) -> Iterator[Progress]:
    for look in looks:
        watch(look)
        yield look


def _graded(
    ranked: list[tuple[Problem, int]], said: list[str], finished: np.ndarray, lengths: np.ndarray, verifier: Grading
) -> tuple[list[Graded], int]:
    """Responses to problems, with their ranks, and how many tokens they have together."""
    grades = verifier.grade(said, [problem.answer for problem, _ in ranked])
    return [
        Graded(
            problem=problem.id,
            rank=rank,
            response=said[i],
            score=float(grades.scores[i]),
            scorable=bool(grades.scorable[i]),
            finished=bool(finished[i]),
            tokens=int(lengths[i]),
            reason=grades.reasons.get(i),
        )
        for i, (problem, rank) in enumerate(ranked)
    ], int(lengths.sum())


def count(batches: Iterator[tuple[list[Graded], int]], num_problems: int) -> Counts:
    """Adds graded responses up; problem ids are 0..num_problems - 1."""
    correct, scorable = np.zeros(num_problems, np.int64), np.zeros(num_problems, np.int64)
    tokens = total = clipped = 0
    failures: list[str | None] = []
    for rows, generated in batches:
        tokens += generated
        for row in rows:
            correct[row.problem] += row.scorable and row.score > 0
            scorable[row.problem] += row.scorable
            clipped += not row.finished
            total += 1
        failures += [row.reason for row in rows if not row.scorable]
    return Counts(correct, scorable, tokens, clipped / max(total, 1), total, failures)
