"""Rules by name: `make`, `names` and `settings`.

Each name is a recipe: which adversaries it has, which shuffle makes it a control, and defaults that differ from the
configurations' own. Settings are the fields of the configurations of its parts.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Literal, NamedTuple

from gdro_jax.controllers import _checks, difficulty, prompt_gdro, rollout_gdro, rules

_OWN_DIFFICULTY: Mapping[str, object] = {"edges": (0.1, 0.25, 0.5, 0.75, 0.9), "statistic": "beta", "unseen": "prior"}
_PUBLISHED_PROMPT: Mapping[str, object] = {
    "edges": (0.1, 0.2, 0.4, 0.6, 0.8, 0.9),
    "window": 100,
    "hysteresis": 0.03,
    "statistic": "any",
    "unseen": "hardest",
    "signal": "surrogate",
    "step_size": 0.65,
    "ema": 0.12,
    "exploration": 0.01,
    "weight_cap": 15.0,
    "weights": "published",
    "ema_debias": False,
}
_PUBLISHED_ROLLOUT: Mapping[str, object] = {
    "edges": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "window": 50,
    "hysteresis": 0.03,
    "statistic": "any",
    "unseen": "hardest",
    "step_size": 0.65,
    "ema": 0.4,
    "exploration": 0.01,
    "dual_step_size": 0.05,
    "utility": "surrogate",
    "selection": "argmax",
    "dual": "exact",
    "per_prompt": False,
}
_RULE_FIELDS: Mapping[str, object] = {"signal": "error", "use_current_batch": False}


class _Recipe(NamedTuple):
    parts: tuple[str, ...]
    defaults: Mapping[str, object]
    shuffle: Literal["weights", "budgets"] | None = None


def _recipes() -> dict[str, _Recipe]:
    return {
        "uniform": _Recipe(("difficulty",), _OWN_DIFFICULTY),
        "prompt_gdro": _Recipe(("difficulty", "prompt"), _OWN_DIFFICULTY),
        "rollout_gdro": _Recipe(("difficulty", "rollout"), _OWN_DIFFICULTY),
        "joint": _Recipe(("difficulty", "prompt", "rollout"), _OWN_DIFFICULTY),
        "prompt_gdro_published": _Recipe(("difficulty", "prompt"), _PUBLISHED_PROMPT),
        "rollout_gdro_published": _Recipe(("difficulty", "rollout"), _PUBLISHED_ROLLOUT),
        "permuted_budgets": _Recipe(("difficulty", "rollout"), _OWN_DIFFICULTY, "budgets"),
        "random_weights": _Recipe(("difficulty", "prompt"), _OWN_DIFFICULTY, "weights"),
    }


def names() -> tuple[str, ...]:
    """The names that `make` knows."""
    return tuple(_recipes())


def settings(name: str) -> dict[str, object]:
    """The settings that `make(name, ...)` takes, each by its shortest accepted name, with its default.

    The defaults of min_rollouts and max_rollouts depend on mean_rollouts: min(2, mean_rollouts), 3 * mean_rollouts;
    here they are None. Raises ValueError for an unknown name.
    """
    recipe = _recipe(name)
    found: dict[str, object] = {}
    for part in recipe.parts:
        for field, default in _fields(part).items():
            owners = [other for other in recipe.parts if field in _fields(other)]
            label = field if len(owners) == 1 else f"{part}_{field}"
            found[label] = recipe.defaults.get(field, default)
    if "prompt" in recipe.parts:
        found |= {field: recipe.defaults.get(field, default) for field, default in _RULE_FIELDS.items()}
    return found


def make(name: str, *, num_prompts: int, prompts_per_step: int, mean_rollouts: int, **settings: object) -> rules.Rule:
    """The rule `name` for a data set of `num_prompts`, steps of `prompts_per_step` prompts, `mean_rollouts` each.

    Settings are the fields of `difficulty.Config`, `prompt_gdro.Config` (but num_bins) and `rollout_gdro.Config` (but
    num_bins and mean_rollouts), as far as the rule has these parts, and `signal` and `use_current_batch` for rules
    that have a prompt adversary. A field may always be prefixed by its part (`difficulty_window`, `prompt_ema`,
    `rollout_ema`); it must be where the rule has it twice (`joint`: step_size, exploration, ema). `settings(name)`
    lists them with their defaults.

    Raises ValueError for an unknown name or setting (with a suggestion), a setting given twice or without a needed
    prefix, any value that a configuration does not allow, and statistic="pass_at_k" with a k above the fewest rollouts
    that a prompt can get (min_rollouts, or mean_rollouts without a rollout adversary): it would not be unbiased.
    """
    recipe = _recipe(name)
    given: dict[str, dict[str, object]] = {part: {} for part in (*recipe.parts, "rule")}
    for field, value in recipe.defaults.items():
        for part in _owners(recipe, field):
            given[part][field] = value
    seen: dict[tuple[str, str], str] = {}
    for setting, value in settings.items():
        part, field = _resolve(name, recipe, setting)
        if (part, field) in seen:
            raise ValueError(f"settings {seen[part, field]!r} and {setting!r} of rule {name!r} are the same")
        seen[part, field] = setting
        given[part][field] = value
    levels = difficulty.Config(**given["difficulty"])  # type: ignore[arg-type]
    prompt, rollout = None, None
    if "prompt" in recipe.parts:
        prompt = prompt_gdro.Config(num_bins=levels.num_bins, **given["prompt"])  # type: ignore[arg-type]
    if "rollout" in recipe.parts:
        _need_integer(mean_rollouts)
        bounds = {"min_rollouts": min(2, mean_rollouts), "max_rollouts": 3 * mean_rollouts}
        rollout = rollout_gdro.Config(
            num_bins=levels.num_bins,
            mean_rollouts=mean_rollouts,
            **(bounds | given["rollout"]),  # type: ignore[arg-type]
        )
    _need_enough_rollouts(levels, rollout, mean_rollouts)
    config = rules.Config(
        num_prompts=num_prompts,
        prompts_per_step=prompts_per_step,
        mean_rollouts=mean_rollouts,
        difficulty=levels,
        prompt=prompt,
        rollout=rollout,
        shuffle=recipe.shuffle,
        **given["rule"],  # type: ignore[arg-type]
    )
    return rules.compose(config)


def _need_integer(mean_rollouts: object) -> None:
    if isinstance(mean_rollouts, bool) or not isinstance(mean_rollouts, int) or mean_rollouts < 1:
        raise ValueError(f"mean_rollouts={mean_rollouts!r} is not allowed: it must be an integer >= 1")


def _need_enough_rollouts(levels: difficulty.Config, rollout: rollout_gdro.Config | None, mean_rollouts: int) -> None:
    if levels.statistic != "pass_at_k":
        return
    field, fewest = ("mean_rollouts", mean_rollouts) if rollout is None else ("min_rollouts", rollout.min_rollouts)
    if levels.k > fewest:
        allowed = f"at most {field}={fewest} under statistic='pass_at_k', which is unbiased only for k rollouts or more"
        raise _checks.reject("k", levels.k, allowed)


def _recipe(name: str) -> _Recipe:
    recipes = _recipes()
    if name not in recipes:
        raise ValueError(f"unknown rule {name!r}{_suggest(str(name), list(recipes))}; known: {', '.join(recipes)}")
    return recipes[name]


def _fields(part: str) -> dict[str, object]:
    """Fields of a part's configuration that are settings, with their defaults."""
    if part == "rule":
        return dict(_RULE_FIELDS)
    config = {"difficulty": difficulty.Config, "prompt": prompt_gdro.Config, "rollout": rollout_gdro.Config}[part]
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    if part == "rollout":
        fields |= {"min_rollouts": None, "max_rollouts": None}
    return {key: value for key, value in fields.items() if key not in ("num_bins", "mean_rollouts")}


def _owners(recipe: _Recipe, field: str) -> list[str]:
    parts = (*recipe.parts, "rule") if "prompt" in recipe.parts else recipe.parts
    return [part for part in parts if field in _fields(part)]


def _resolve(name: str, recipe: _Recipe, setting: str) -> tuple[str, str]:
    """The part and the field that a setting's name stands for."""
    owners = _owners(recipe, setting)
    if len(owners) == 1:
        return owners[0], setting
    if owners:
        full = " or ".join(repr(f"{part}_{setting}") for part in owners)
        raise ValueError(f"setting {setting!r} of rule {name!r} is ambiguous: say {full}")
    for part in recipe.parts:
        field = setting.removeprefix(f"{part}_")
        if field != setting and field in _fields(part):
            return part, field
    known = list(settings(name))
    raise ValueError(f"rule {name!r} has no setting {setting!r}{_suggest(setting, known)}; it has {', '.join(known)}")


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
