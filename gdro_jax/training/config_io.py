"""Reads and writes configurations: YAML file, then `--section.field VALUE` overrides; anything unknown is an error."""

import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence

import yaml

from gdro_jax.data.files import show
from gdro_jax.training.config import Config

_REPLACED = {"train.length_buckets": "train.attention_tile"}  # fields of before, and what does their work now


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one line that says what, where and what is allowed."""


def load(file: str | pathlib.Path | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The defaults, changed by a YAML file, changed by overrides.

    Args:
      file: YAML with the sections of `Config`, each optional.
      overrides: pairs of a dotted field, such as `train.learning_rate`, and its value, YAML except for text fields.

    Raises:
      ConfigError: a missing or malformed file, an unknown section or field, a value of the wrong type or out of range.
    """
    raw = {} if file is None else _read(pathlib.Path(file))
    for dotted, text in overrides:
        _set(raw, dotted, text)
    return from_dict(raw, where=str(file) if file is not None else "configuration")


def from_dict(raw: Mapping[str, object], where: str = "configuration") -> Config:
    """A validated `Config` from nested plain values; the errors of `load`."""
    sections = {f.name: f.type for f in dataclasses.fields(Config)}
    built: dict[str, typing.Any] = {}
    for name, values in raw.items():
        if name not in sections:
            raise ConfigError(f"{where}: unknown section {name!r}; {_hint(str(name), sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: section {name}: expected fields, got {values!r}")
        built[name] = _section(sections[name], values, name, where)
    try:
        return Config(**built)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_dict(config: Config) -> dict[str, dict[str, object]]:
    """Every field, defaults too, as nested plain values that `from_dict` reads back to an equal configuration."""
    return dataclasses.asdict(config)


def save(config: Config, file: pathlib.Path) -> None:
    """Writes the whole configuration as YAML, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    partial.replace(file)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which plain YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(file: pathlib.Path) -> dict[str, dict[str, object]]:
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; a configuration file is needed")
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file")
    try:
        raw = yaml.load(file.read_bytes(), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected sections, got {type(raw).__name__}")
    return raw


def _set(raw: dict[str, dict[str, object]], dotted: str, text: str) -> None:
    path = dotted.split(".")
    if len(path) < 2 or not all(path):
        raise ConfigError(f"--{dotted}: expected --section.field VALUE")
    node: dict = raw
    for name in path[:-1]:
        node[name] = {} if node.get(name) is None else node[name]
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"--{dotted}: {name} is not a section")
    node[path[-1]] = text if _takes_text(path, text) else _parsed(dotted, text)


def _takes_text(path: Sequence[str], text: str) -> bool:
    """Whether the field takes text, which then stands for itself, braces and colons too; `null` is none."""
    section = next((f.type for f in dataclasses.fields(Config) if f.name == path[0]), None)
    hint = typing.get_type_hints(section).get(path[1]) if section is not None and len(path) == 2 else None
    return hint is str or (hint == str | None and text != "null")


def _parsed(dotted: str, text: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{dotted} {text}: not valid YAML ({' '.join(str(error).split())})") from None


def _section(kind: typing.Any, values: Mapping[str, object], section: str, where: str) -> object:
    hints = typing.get_type_hints(kind)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            hint = _REPLACED.get(f"{section}.{name}")
            hint = _hint(str(name), hints) if hint is None else f"{hint} does its work now"
            raise ConfigError(f"{where}: unknown field in section {section}: {name!r} (given {show(value)}); {hint}")
        checked[name] = _typed(value, hints[name], f"{where}: {section}.{name}")
    try:
        return kind(**checked)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _hint(name: str, known: typing.Iterable[str]) -> str:
    """The known names that an unknown one may stand for, or fields of its name elsewhere; all where there are none."""
    names = list(known)
    places = {section.name: typing.get_type_hints(section.type) for section in dataclasses.fields(Config)}
    near = (
        [f"{section}.{name}" for section, fields in places.items() if name in fields]
        or [other for other in names if name in (words := other.split("_")) or name == "".join(w[:1] for w in words)]
        or difflib.get_close_matches(name, names)
    )
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}"


def _typed(value: object, hint: typing.Any, where: str) -> object:
    """The value if it is of the annotated type; whole numbers pass as floats, and so does text such as 1e-4."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in (o for o in options if o is not type(None)):
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                continue
        if isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("null" if o is type(None) else (typing.get_origin(o) or o).__name__ for o in options)
    raise ConfigError(f"{where}={'null' if value is None else repr(value)}: expected {names}")
