"""`gdro eval`, `gdro regrade` and `gdro compare-evals`, on a validated configuration."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gdro_jax import evaluation, rewards
from gdro_jax.data import benchmarks, prompts
from gdro_jax.data.sources import Problem
from gdro_jax.evaluation import compare, run, score, store, tables
from gdro_jax.evaluation.run import Graded
from gdro_jax.models.checkpoint import digest
from gdro_jax.sampling import SamplingConfig
from gdro_jax.training import engines, inputs, setup
from gdro_jax.training.config import Config, ModelConfig

# Settings of the sampler that change time and memory, not what is drawn beyond rounding.
_NO_MATTER = ("slots", "segment", "cache", "page_tokens", "cache_tokens")
SECONDS_BETWEEN_LINES = 10.0


class Asked(NamedTuple):
    """One set of problems to evaluate on."""

    prompts: prompts.Prompts
    template: str
    verifier: str
    private: bool


def evaluate(
    model: str,
    problems: str | None,
    names: Sequence[str],
    folder: str | None,
    out: str | None,
    config: Config,
    stop: Callable[[], bool],
) -> bool:
    """Evaluates a model on a file of problems or on benchmarks; prints a table, and with `out` keeps everything.

    Args:
      model: a Hugging Face folder or name, or `embedded`.
      problems: a file, `embedded`, or None where benchmarks are named.
      names, folder: benchmarks, `all` for every one the folder holds.
      stop: asked at every look at the sampler.

    Returns:
      False when stopped; the same command then goes on.
    """
    wanted = dataclasses.replace(config.model, path=model, param_dtype=config.model.dtype)  # nothing is trained
    seen = setup.outline(wanted)
    asked = _asked(problems, names, folder, seen, config)
    sampling = config.eval_sampling(seen.stop_tokens)
    for name, it in asked.items():
        setup.check_length(seen.architecture, it.prompts.longest, sampling.max_new_tokens, config, f"{name}'s ")
    settings = _settings(model, asked, seen, sampling, config)
    place = None if out is None else setup.claim_folder(out, "--out")
    if place is None:
        _say(["nothing is kept; --out FOLDER keeps every response, goes on after an interrupt, and can be compared"])
    else:
        store.begin(place, settings, {name: (it.prompts.problems, it.private) for name, it in asked.items()})
    public = {name: it.prompts for name, it in asked.items() if not it.private}
    _say([f"{name}  {inputs.first_prompt(ready, seen.tokenizer)}" for name, ready in public.items()])
    policy = setup.load_policy(wanted, seen=seen)
    scores: dict[str, score.Score] = {}
    as_in_training: Mapping[str, Any] = {}
    for name, it in asked.items():
        with inputs.verifier(config, it.verifier) as verifier:
            rows = _sample(name, it, policy, verifier, config, place, stop)
        if rows is None:
            return False
        scores[name] = score.score(
            it.prompts.problems, rows, config.eval.samples, whole_response=it.verifier == "exact"
        )
        if problems is not None:
            as_in_training = _training_summary(it.prompts.problems, rows, config.eval.k)
    _report(scores, place, as_in_training)
    return True


def regrade(folder: str, config: Config) -> None:
    """Grades saved responses again, with each set's own verifier and the configuration's deadline, and reports anew."""
    place = pathlib.Path(folder)
    saved, k = store.read(place), store.reported_k(place)
    scores: dict[str, score.Score] = {}
    as_in_training: Mapping[str, Any] = {}
    for name, problems in saved.problems.items():
        kind, golds = saved.settings["sets"][name]["verifier"], {p.id: p.answer for p in problems}
        before = saved.responses[name]
        with inputs.verifier(config, kind) as verifier:
            grades = verifier.grade([row.response for row in before], [golds[row.problem] for row in before])
        rewards.check_failures(grades.failures, len(before), config.data.max_unscorable, name)
        rows = [
            row._replace(score=float(score_), scorable=bool(scorable), reason=grades.reasons.get(n))
            for n, (row, score_, scorable) in enumerate(zip(before, grades.scores, grades.scorable, strict=True))
        ]
        changed = sum(a[:5] != b[:5] for a, b in zip(before, rows, strict=True))
        sys.stderr.write(f"{name}: {changed} of {len(rows)} grades changed\n")
        store.replace(place, name, rows)
        scores[name] = score.score(problems, rows, saved.settings["samples"], whole_response=kind == "exact")
        if k is not None:  # of a file of problems, which is the only set
            as_in_training = _training_summary(problems, rows, k)
    _report(scores, place, as_in_training)


def compare_evals(folders: Sequence[str], out: str | None) -> None:
    """Prints the paired differences of evaluations against the first one, and with `out` writes them as JSON."""
    if len(folders) < 2:
        raise store.StoreError(f"{folders[0]}: is one evaluation; at least two are compared")
    found = compare.compare([pathlib.Path(folder) for folder in folders])
    print(compare.format_comparison(found, pathlib.Path(folders[0])))
    if out is not None:
        try:
            pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(out).write_text(json.dumps({"baseline": folders[0], "against_it": found}, indent=2) + "\n")
        except OSError as error:
            raise setup.InputError(f"--out={out!r}: not a file that can be written ({error.strerror})") from None


# Parts of evaluate --------------------------------------------------------------------------------------------------
def _asked(
    problems: str | None, names: Sequence[str], folder: str | None, seen: setup.Outline, config: Config
) -> dict[str, Asked]:
    """Every set by name, all of them checked before anything is sampled."""
    response = config.eval_sampling(seen.stop_tokens).max_new_tokens
    tokenizer, most = seen.tokenizer, setup.most_prompt_tokens(config, seen.architecture, response)
    if problems is not None:
        with inputs.verifier(config) as grader:
            loaded, left_out = inputs.checked(problems, "heldout", config, grader)
        ready, notes = inputs.ready(loaded, config.eval_template, tokenizer, config, most)
        _say([*left_out, *notes])
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", pathlib.Path(problems).stem)
        return {name: Asked(ready, config.eval_template, config.data.verifier, False)}
    if folder is None:
        raise setup.InputError("--benchmark-folder: where the benchmarks' files are is needed with --benchmarks")
    chosen = benchmarks.present(folder) if list(names) == ["all"] else tuple(dict.fromkeys(names))
    if not chosen:
        raise setup.InputError(f"--benchmark-folder={folder!r}: holds none of {', '.join(benchmarks.BENCHMARKS)}")
    out: dict[str, Asked] = {}
    for name in chosen:
        source = benchmarks.load(name, folder, on_bad_row=config.data.on_bad_row)
        benchmark = benchmarks.BENCHMARKS[name]
        with inputs.verifier(config, benchmark.verifier) as grader:  # no response to a row without an answer is sampled
            usable, left_out = inputs.with_usable_answers(name, source, "drop", grader)
        template = config.eval.template or "boxed"
        ready, notes = inputs.ready(usable, template, tokenizer, config, most)
        _say([*left_out, *notes])
        out[name] = Asked(ready, template, benchmark.verifier, benchmark.private)
    return out


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        sys.stderr.write(note + "\n")


def _settings(
    model: str, asked: dict[str, Asked], seen: setup.Outline, sampling: SamplingConfig, config: Config
) -> dict[str, Any]:
    return {
        "model": model,
        "weights": digest(setup.model_folder(model), f"{config.model.dtype} {config.model.random_init}"),
        "seed": config.run.seed,
        "samples": config.eval.samples,
        **{name: value for name, value in dataclasses.asdict(sampling).items() if name not in _NO_MATTER},
        "dtype": config.model.dtype,
        "tokenizer": _tokenizer(dataclasses.replace(config.model, path=model), seen),
        "sets": {
            name: {
                "problems": len(it.prompts.problems),
                **({"dropped": len(it.prompts.dropped)} if it.prompts.dropped else {}),
                "fingerprint": benchmarks.fingerprint(it.prompts.problems),
                "template": it.template,
                "chat": config.data.chat,
                "verifier": it.verifier,
            }
            for name, it in asked.items()
        },
    }


def _tokenizer(config: ModelConfig, seen: setup.Outline) -> str:
    """Tells tokenizers apart, chat templates too."""
    found = hashlib.sha256((setup.tokenizer_folder(config) / "tokenizer.json").read_bytes())
    found.update(str(seen.tokenizer.chat_template).encode())
    return found.hexdigest()[:16]


def _sample(
    name: str,
    asked: Asked,
    policy: setup.Policy,
    verifier: rewards.Verifier,
    config: Config,
    place: pathlib.Path | None,
    stop: Callable[[], bool],
) -> list[Graded] | None:
    """Every response to a set, those that an earlier call kept among them; None when stopped."""
    samples, per_call = config.eval.samples, config.eval.problems_per_call
    total = len(asked.prompts.problems) * samples
    kept = [] if place is None else store.resume(place, name)
    tokens = sum(row.tokens for row in kept)
    failures = [row.reason for row in kept if not row.scorable]
    if len(kept) < total:
        sampler = engines.sampler(policy.model, config.eval_sampling(policy.stop_tokens))
        # A set's keys are its own, whatever else is evaluated beside it.
        key = jax.random.fold_in(jax.random.key(config.run.seed), zlib.crc32(name.encode()))
        done, told = {(row.problem, row.rank) for row in kept}, time.monotonic()
        for rows, generated in run.responses(
            sampler, asked.prompts, policy.tokenizer, verifier, key, samples, asked.prompts.longest, per_call,
            kept=done, as_they_finish=True,
        ):  # fmt: skip
            if place is not None and rows:
                store.append(place, name, rows)
            kept += rows
            tokens += generated
            if len(kept) == total or time.monotonic() > told + SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                sys.stderr.write(f"{name}  {len(kept):,}/{total:,} responses  {tokens:,} tokens\n")
            failures += [row.reason for row in rows if not row.scorable]
            if len(kept) >= per_call * samples:  # the first to finish are no sample of all
                rewards.check_failures(failures, len(kept), config.data.max_unscorable, name)
            if len(kept) < total and stop():
                return None
    rewards.check_failures(failures, total, config.data.max_unscorable, name)  # of an earlier call's too
    kept.sort(key=lambda row: (row.problem, row.rank))
    if place is not None:
        store.replace(place, name, kept)
    return kept


def _report(scores: dict[str, score.Score], place: pathlib.Path | None, more: Mapping[str, Any]) -> None:
    """Prints the table; with a folder keeps it, a figure and the summary, which begins with `more`."""
    text = tables.format_scores(scores)
    print(text)
    if place is None:
        return
    (place / store.SUMMARY).write_text(json.dumps({**more, "sets": scores}, indent=2) + "\n")
    (place / "table.txt").write_text(text + "\n")
    tables.draw(scores, place / "scores.png")


def _training_summary(problems: Sequence[Problem], rows: Sequence[Graded], k: int) -> Mapping[str, Any]:
    """What training logs of the same responses; nothing where none could be graded."""
    counts = run.count(iter([(list(rows), 0)]), len(problems))
    strata = [problem.stratum for problem in problems]
    with contextlib.suppress(evaluation.NothingScorableError):
        return evaluation.summarise(counts.correct, counts.scorable, strata, k)
    return {}
