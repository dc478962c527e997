"""From problems to token ids: template, tokenisation, length limit, stop tokens, padding, and the order of the data."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jinja2
import numpy as np
from numpy.typing import NDArray

from gdro_jax.data.sources import DataError, Problem

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "{problem}",
        "boxed": "{problem}\nLet's think step by step and output the final answer within \\boxed{}.",
    }
)
"""Templates by name; ``boxed`` is the one of arXiv 2601.19280."""
_FIXED_IN_CHAT = ("messages", "add_generation_prompt")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> Any: ...

    def __call__(
        self, text: list[str], *, padding: bool, truncation: bool, add_special_tokens: bool = True
    ) -> Mapping[str, list[list[int]]]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def decode(self, token_ids: list[int]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Problems that fit the length limit, with dense ids 0..N-1 in data order, and their token ids."""

    problems: tuple[Problem, ...]
    tokens: tuple[tuple[int, ...], ...]
    """One tuple of token ids a problem, never empty."""
    dropped: tuple[Problem, ...]
    """The problems left out as too long, under the ids they came with."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(ids) for ids in self.tokens)

    def only(self, wanted: Callable[[Problem], bool]) -> "Prompts":
        """The problems that are wanted, under the ids they have."""
        places = [place for place, problem in enumerate(self.problems) if wanted(problem)]
        return replace(
            self,
            problems=tuple(self.problems[place] for place in places),
            tokens=tuple(self.tokens[place] for place in places),
        )

    @property
    def fingerprint(self) -> str:
        """Of everything a run learns from: ids, tokens, answers and strata, in order."""
        digest = hashlib.sha256()
        for problem, ids in zip(self.problems, self.tokens, strict=True):
            digest.update(json.dumps([problem.id, problem.answer, problem.stratum, ids]).encode())
        return digest.hexdigest()


def resolve_template(template: str) -> str:
    """The text of a template given by name or as text.

    Raises:
        ValueError: neither a known name nor a text that holds ``{problem}`` exactly once.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if template.count("{problem}") != 1:
        close = get_close_matches(template, TEMPLATES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"template: {template!r} is not allowed; it must be one of {', '.join(TEMPLATES)}, "
            f"or a text with {{problem}} in it exactly once{hint}"
        )
    return template


def render(template: str, problem: str) -> str:
    """The prompt of a problem. Only ``{problem}`` is replaced: any other brace stays as it is."""
    before, _, after = resolve_template(template).partition("{problem}")
    return before + problem + after


def prepare(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    *,
    template: str = "boxed",
    chat: Mapping[str, object] | None = None,
    max_tokens: int | None = None,
    on_overlong: str = "refuse",
) -> Prompts:
    """Render and tokenise problems.

    Args:
        template: a name of ``TEMPLATES`` or a text with ``{problem}``.
        chat: None for the text as it is; otherwise it becomes the user's turn in the tokenizer's own chat template,
            ``system`` the system's, and every other entry (such as ``enable_thinking``) is passed to that template.
        max_tokens: longest prompt allowed; None for no limit.
        on_overlong: ``refuse`` raises, naming the first prompt that is longer and how many more there are, ``drop``
            leaves them out and lists them.

    Raises:
        ValueError: a bad setting.
        DataError: a prompt without tokens, one that is too long under ``refuse``, or none that fits.
    """
    if on_overlong not in ("refuse", "drop"):
        raise ValueError(f"on_overlong: {on_overlong!r} is not allowed; it must be 'refuse' or 'drop'")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens!r} is not allowed; it must be at least 1, or None")
    if not problems:
        raise DataError("problems: there are none; at least one is needed")
    texts = [render(template, problem.prompt) for problem in problems]
    if chat is None:
        encoded = tokenizer(texts, padding=False, truncation=False)["input_ids"]
    else:
        encoded = tokenizer(
            [chat_text(tokenizer, text, chat) for text in texts],
            padding=False,
            truncation=False,
            add_special_tokens=False,  # the template has them
        )["input_ids"]
    kept: list[Problem] = []
    tokens: list[tuple[int, ...]] = []
    dropped: list[Problem] = []
    refused = ""
    for problem, ids in zip(problems, encoded, strict=True):
        if not ids:
            raise DataError(f"problem {problem.id}: its prompt has no tokens; at least one is needed")
        if max_tokens is not None and len(ids) > max_tokens:
            dropped.append(problem)
            if on_overlong == "refuse":
                refused = refused or f"its prompt has {len(ids)} tokens, more than the {max_tokens} allowed"
            continue
        kept.append(replace(problem, id=len(kept)))
        tokens.append(tuple(int(token) for token in ids))
    if refused:
        more = f"; so have {len(dropped) - 1} more" if len(dropped) > 1 else ""
        raise DataError(
            f"problem {dropped[0].id}: {refused}{more}; raise the limit, or drop such prompts (data.overlong=drop)"
        )
    if not kept:
        raise DataError(f"all {len(problems)} prompts have more than the {max_tokens} tokens allowed")
    return Prompts(problems=tuple(kept), tokens=tuple(tokens), dropped=tuple(dropped))


def chat_text(tokenizer: Tokenizer, text: str, chat: Mapping[str, object]) -> str:
    """The text as the user's turn in the tokenizer's chat template, up to where the answer begins.

    Raises:
        DataError: the tokenizer has no chat template, or one that knows no such option or cannot take its value.
    """
    if not tokenizer.chat_template:
        raise DataError("chat: the tokenizer has no chat template; leave data.chat null, or give another tokenizer")
    options = dict(chat)
    system = options.pop("system", None)
    for name in options:
        if name in _FIXED_IN_CHAT or not re.search(rf"\b{re.escape(str(name))}\b", str(tokenizer.chat_template)):
            raise DataError(f"data.chat.{name}={options[name]!r}: the tokenizer's chat template has no such option")
    turns: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": text})
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"data.chat={dict(chat)!r}: the tokenizer's chat template refuses it ({error})") from error


def stop_tokens(model_folder: str | Path | None = None, tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """Every id that ends a response, sorted: of ``generation_config.json``, ``config.json`` and the tokenizer.

    Raises:
        DataError: none is declared anywhere, or a file declares something else than an id or a list of ids.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json") if model_folder is not None else ():
        found |= _declared_stops(Path(str(model_folder)) / name)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if not found:
        raise DataError(f"stop tokens: neither {model_folder} nor the tokenizer declares an eos_token_id")
    return tuple(sorted(found))


def _declared_stops(path: Path) -> set[int]:
    if not path.is_file():
        return set()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    value = content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise DataError(f"{path}: eos_token_id is {value!r}; a token id or a list of them is needed")
    return set(ids)


def bucket(longest: int, multiple: int = 16) -> int:
    """The padded length for prompts of at most ``longest`` tokens: the next multiple of ``multiple``."""
    if longest < 1 or multiple < 1:
        raise ValueError(f"longest, multiple: {longest}, {multiple} are not allowed; both must be at least 1")
    return -(-longest // multiple) * multiple


def pad(prompts: Sequence[Sequence[int]], length: int, pad_id: int = 0) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Right-padded token ids int32[P, L] and the mask bool[P, L] of those that are real, L = ``length``.

    Raises:
        ValueError: a prompt is longer than ``length``.
    """
    lengths = np.array([len(ids) for ids in prompts], dtype=np.int64)
    if lengths.size and int(lengths.max()) > length:
        raise ValueError(f"length: {length} is too short; the longest prompt has {int(lengths.max())} tokens")
    mask = np.arange(length)[None, :] < lengths[:, None]
    tokens = np.full((len(prompts), length), pad_id, dtype=np.int32)
    tokens[mask] = np.fromiter((token for ids in prompts for token in ids), dtype=np.int32, count=int(lengths.sum()))
    return tokens, mask


def order(seed: int, position: int, num_prompts: int, count: int) -> NDArray[np.int32]:
    """Ids of the next ``count`` prompts after ``position`` prompts were taken: int32[count], no id twice.

    A pure function of its arguments: nothing to save, any position is as cheap as any other. Epochs are permutations
    keyed on (seed, epoch), built from the raw Philox stream so that they are the same under every NumPy version. An
    epoch is ``num_prompts // count`` whole steps; the few prompts left over (others each epoch) sit it out. A position
    that is no multiple of ``count`` may run over an epoch's end: ids already taken in the same step are then skipped.

    Raises:
        ValueError: a negative seed or position, or a ``count`` outside 1..num_prompts.
    """
    if seed < 0 or position < 0:
        raise ValueError(f"seed, position: {seed}, {position} are not allowed; neither may be negative")
    if not 1 <= count <= num_prompts:
        raise ValueError(f"count: {count} is not allowed; it must be in 1..{num_prompts}, the number of prompts")
    per_epoch = num_prompts // count * count
    epoch, offset = divmod(position, per_epoch)
    ids = _permutation(seed, epoch, num_prompts)[offset : min(offset + count, per_epoch)]
    if ids.size < count:
        following = _permutation(seed, epoch + 1, num_prompts)
        fresh = following[~np.isin(following, ids)]
        ids = np.concatenate([ids, fresh[: count - ids.size]])
    return ids.astype(np.int32)


def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A permutation of 0..size-1 that depends on (seed, epoch) alone."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(stream.random_raw(size), kind="stable").astype(np.int64)


def first_per_stratum(prompts: Prompts, count: int | None) -> Prompts:
    """The first `count` problems of each stratum, ids kept; all of them for None."""
    if count is None:
        return prompts
    taken: dict[str, int] = {}

    def wanted(problem: Problem) -> bool:
        taken[problem.stratum] = taken.get(problem.stratum, 0) + 1
        return taken[problem.stratum] <= count

    return prompts.only(wanted)
