"""Configurations: what is read is what was written, and every mistake is one line that names it."""

import dataclasses

import pytest
import yaml

from gdro_jax.training import Config, ConfigError, config_io
from gdro_jax.training.config import TrainConfig


def refused(raw: dict, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_io.from_dict(raw)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_round_trip_of_the_defaults(tmp_path):
    config_io.save(Config(), tmp_path / "config.yaml")
    assert config_io.load(tmp_path / "config.yaml") == Config()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_round_trip_of_a_changed_configuration(tmp_path):
    overrides = [
        ("run.seed", "3"),
        ("run.output", "runs/näme: x"),
        ("run.checkpoint_every", "null"),
        ("train.learning_rate", "1e-4"),
        ("train.dual_clip", "3"),
        ("controller.name", "joint"),
        ("controller.settings.edges", "[0.1, 0.5]"),
        ("controller.settings.prompt_ema", "0.3"),
        ("compare.seeds", "[1, 2]"),
        ("compare.methods.uniform.train.kl_coef", "0.0"),
        ("data.template", "Q: {problem}\\nA: {x}"),
    ]
    config = config_io.load(None, overrides)
    assert config.controller.settings == {"edges": [0.1, 0.5], "prompt_ema": 0.3}
    assert config.run.output == "runs/näme: x" and config.data.template == "Q: {problem}\\nA: {x}"  # text as it is
    assert config.train.dual_clip == 3.0 and isinstance(config.train.dual_clip, float)
    assert config.compare.methods == {"uniform": {"train": {"kl_coef": 0.0}}}
    config_io.save(config, tmp_path / "c.yaml")
    assert config_io.load(tmp_path / "c.yaml") == config
    assert config_io.from_dict(config_io.to_dict(config)) == config


def test_everything_is_written_defaults_too(tmp_path):
    config_io.save(Config(), tmp_path / "config.yaml")
    raw = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {s: set(f) for s, f in raw.items()} == {
        section.name: {f.name for f in dataclasses.fields(getattr(Config(), section.name))}
        for section in dataclasses.fields(Config)
    }


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {learning_rate: 1e-4, warmup_steps: 7}\nrun:\n  seed: 5\n")
    config = config_io.load(file, [("run.seed", "6")])
    assert (config.run.seed, config.train.warmup_steps, config.train.learning_rate) == (6, 7, 1e-4)
    assert config.train.kl_coef == TrainConfig().kl_coef
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert config_io.load(empty) == Config()


def test_unknown_names_are_refused_with_a_suggestion():
    refused({"trian": {}}, "unknown section 'trian'", "did you mean 'train'?")
    refused({"train": {"learning_rat": 1.0}}, "section train", "'learning_rat'", "did you mean 'learning_rate'?")
    refused({"run": {"zzz": 1}}, "'zzz'", "known: output, seed, steps")


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("train", "learning_rat", 0.5, "'learning_rat' (given 0.5); did you mean 'learning_rate'?"),
        ("train", "adam_beta", None, "'adam_beta' (given null); did you mean 'adam_b2' or 'adam_b1' or 'adam_eps'?"),
        ("train", "kl", 1, "'kl' (given 1); did you mean 'kl_coef' or 'kl_estimator'?"),
        ("train", "lr", 0.1, "'lr' (given 0.1); did you mean 'learning_rate'?"),
        ("train", "max_new_tokens", 9, "(given 9); did you mean 'sampling.max_new_tokens' or 'eval.max_new_tokens'?"),
        ("train", "zzz", "x" * 99, "..."),
        ("train", "length_buckets", 4, "'length_buckets' (given 4); train.attention_tile does its work now"),
    ],
)
def test_an_unknown_field_is_told_with_its_value_and_what_may_be_meant(section, field, value, words):
    refused({section: {field: value}}, f"unknown field in section {section}: {field!r} (given ", words)


def test_a_field_without_its_section_is_told_its_section():
    refused({"learning_rate": 1e-4}, "unknown section 'learning_rate'", "did you mean 'train.learning_rate'?")


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("run", "steps", 1.5, "int"),
        ("run", "steps", "7", "int"),
        ("run", "steps", True, "int"),
        ("run", "steps", None, "int"),
        ("run", "checkpoint_every", "often", "int or null"),
        ("run", "save_model", 1, "bool"),
        ("run", "output", 3, "str"),
        ("train", "learning_rate", "fast", "float"),
        ("train", "learning_rate", True, "float"),
        ("train", "learning_rate", 10**400, "float"),
        ("train", "dual_clip", [3], "float or null"),
        ("controller", "settings", [1], "dict"),
        ("compare", "seeds", 3, "list"),
        ("compare", "seeds", ["a"], "list of whole numbers"),
        ("model", "random_init", 0.5, "int or null"),
    ],
)
def test_wrong_types(section, field, value, expected):
    refused({section: {field: value}}, f"{section}.{field}", expected)


def test_a_section_must_hold_fields():
    refused({"train": 3}, "section train", "expected fields")


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), ("2.5E-3", 2.5e-3), ("1", 1.0)])
def test_floats_in_every_spelling(text, value):
    assert config_io.load(None, [("train.learning_rate", text)]).train.learning_rate == value


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("run", "steps", 0),
        ("run", "seed", -1),
        ("run", "seed", 2**31),
        ("run", "checkpoint_every", 0),
        ("run", "keep_checkpoints", 0),
        ("run", "log_every", 0),
        ("model", "dtype", "float16"),
        ("data", "on_bad_row", "keep"),
        ("data", "template", "boxd"),
        ("data", "max_prompt_tokens", 0),
        ("data", "overlong", "cut"),
        ("data", "verifier", "llm"),
        ("data", "verifier_workers", 0),
        ("data", "verifier_timeout", 0.0),
        ("data", "verifier_timeout", float("inf")),
        ("data", "max_unscorable", 1.1),
        ("controller", "mean_rollouts", 0),
        ("sampling", "max_new_tokens", 0),
        ("sampling", "temperature", 0.0),
        ("sampling", "temperature", -1.0),
        ("sampling", "top_p", 0.9),
        ("sampling", "top_k", 5),
        ("sampling", "min_p", 0.1),
        ("sampling", "min_new_tokens", 2),
        ("sampling", "slots", 0),
        ("sampling", "segment", 0),
        ("sampling", "cache_dtype", "int4"),
        ("sampling", "cache", "pages"),
        ("sampling", "page_tokens", 0),
        ("sampling", "cache_tokens", 0),
        ("sampling", "gap_tolerance", -0.1),
        ("sampling", "server", "localhost:8000"),
        ("sampling", "server_folder", "served"),  # without a server
        ("sampling", "server_model", "m"),
        ("sampling", "server_timeout", 0.0),
        ("sampling", "gap_tolerance", float("nan")),
        ("train", "prompts_per_step", 0),
        ("train", "minibatches", 0),
        ("train", "minibatches", 3),  # does not divide 64 * 4
        ("train", "microbatches", 0),
        ("train", "microbatches", 7),
        ("train", "learning_rate", 0.0),
        ("train", "learning_rate", float("nan")),
        ("train", "learning_rate", float("inf")),
        ("train", "warmup_steps", -1),
        ("train", "adam_b1", 1.0),
        ("train", "adam_b2", -0.1),
        ("train", "adam_eps", 0.0),
        ("train", "weight_decay", -0.1),
        ("train", "max_grad_norm", 0.0),
        ("train", "kl_coef", -0.1),
        ("train", "kl_coef", float("nan")),
        ("train", "kl_estimator", "k4"),
        ("train", "clip_low", -0.1),
        ("train", "clip_low", 1.5),
        ("train", "clip_high", -0.1),
        ("train", "dual_clip", 1.0),
        ("train", "aggregate", "mean"),
        ("train", "row_weighting", "row"),
        ("train", "advantage_scale", "var"),
        ("train", "advantage_baseline", "zero"),
        ("train", "advantage_clip", 0.0),
        ("eval", "samples", 0),
        ("eval", "k", 9),
        ("eval", "every", 0),
        ("eval", "temperature", -1.0),
        ("eval", "top_p", 0.0),
        ("eval", "top_k", -1),
        ("eval", "min_p", 1.5),
        ("eval", "min_new_tokens", 0),
        ("eval", "min_new_tokens", 7),  # of 6
        ("eval", "problems_per_stratum", 0),
        ("compare", "seeds", []),
        ("compare", "seeds", [1, 1]),
    ],
)
def test_ranges(section, field, value):
    refused({section: {field: value}}, f"{section}.{field}", "must be")


def test_files_that_cannot_be_read(tmp_path):
    bad = {"yaml": "train: [1,\n", "list": "- 1\n", "tab": "train:\n\tx: 1\n"}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name) as caught:
            config_io.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "binary").write_bytes(b"train: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config_io.load(tmp_path / "binary")
    with pytest.raises(ConfigError, match="no such configuration file"):
        config_io.load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder; a configuration file is needed"):
        config_io.load(tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (("train", "1"), "expected --section.field VALUE"),
        (("train.", "1"), "expected --section.field VALUE"),
        (("train.learning_rate", "[1"), "not valid YAML"),
        (("train.learning_rate.x", "1"), "train.learning_rate=.*expected float"),
        (("trian.learning_rate", "1"), "did you mean 'train'"),
        (("reward.overlong_penalty", "3"), "overlong_penalty=3.0: must be 1.0 without reward.overlong_buffer"),
    ],
)
def test_bad_overrides(override, words):
    with pytest.raises(ConfigError, match=words):
        config_io.load(None, [override])


def test_an_estimator_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"train.kl_estimator='k1': must be k3 with train.kl_coef=0"):
        config_io.load(None, [("train.kl_coef", "0"), ("train.kl_estimator", "k1")])
    assert config_io.load(None, [("train.kl_coef", "0.1"), ("train.kl_estimator", "k1")]).train.kl_estimator == "k1"


def test_null_is_off_and_text_is_text():
    config = config_io.load(None, [("model.tokenizer", "null"), ("model.path", "12"), ("eval.data", "null")])
    assert config.model.tokenizer is None and config.eval.data is None and config.model.path == "12"


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.learning_rate = 1.0
    assert hash(TrainConfig()) == hash(TrainConfig()) and TrainConfig() == TrainConfig()
