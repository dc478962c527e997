"""The command line: bad input of every kind is one line and exit code 2; what the commands write fits together."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import safetensors.numpy
import yaml

from gdro_jax import cli, commands, eval_commands, evaluation, rewards
from gdro_jax.models import hf, qwen3
from gdro_jax.rewards.exact import ExactVerifier
from gdro_jax.rewards.verifier import grades_of
from gdro_jax.training import Config, ConfigError, config_io, inputs


@pytest.fixture
def problems(tmp_path):
    """Six problems of two strata."""
    file = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"2{i}+{i}=", "answer": str(20 + 2 * i), "stratum": "ab"[i % 2]} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def invoke(*arguments: object) -> int:
    """The exit code of the command in this process, whichever way it ends."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)


MODEL = "--model.path={tiny}"
BAD = {
    "a missing model folder": (["train", "--model.path", "nowhere"], "model.path='nowhere': no such folder"),
    "a folder that holds no model": (
        ["train", "--model.path={tmp}"],
        "config.json: no such file; expected a folder with",
    ),
    "a file for a model": (["train", "--model.path={problems}"], "is a file, not a folder"),
    "a run for a model": (["eval", "{run}", "embedded"], "is a run, not a model; what it trained is in"),
    "a file for a run": (["report", "{problems}"], "is a file, not a folder"),
    "nothing where something is needed": (["train", "--run.steps=null"], "run.steps=null: expected int"),
    "a missing model folder to evaluate": (["eval", "nowhere", "embedded"], "no such folder"),
    "a typo in an option": (["train", "--run.stesp", "3"], "did you mean 'steps'?"),
    "a typo in a section": (["train", "--runn.steps", "3"], "did you mean 'run'?"),
    "a typo in a file": (["train", "--config", "{typo}"], "did you mean 'learning_rate'?"),
    "a missing file": (["train", "--config", "absent.yaml"], "absent.yaml: no such configuration file"),
    "a file that is not YAML": (["train", "--config", "{broken}"], "not valid YAML"),
    "a wrong type": (["train", "--run.steps=many"], "run.steps='many': expected int"),
    "a value out of range": (["train", "--run.steps=0"], "run.steps=0: must be at least 1"),
    "truncated sampling in training": (["train", "--sampling.top_p=0.9"], "sampling.top_p=0.9: must be 1.0"),
    "an unknown rule": (
        ["train", MODEL, "--controller.name=jont"],
        "controller.name='jont': unknown rule 'jont' (did you mean 'joint'?)",
    ),
    "a setting that the rule lacks": (["train", MODEL, "--controller.settings.eta=1"], "no setting 'eta'"),
    "an impossible budget": (
        ["train", MODEL, "--controller.name=rollout_gdro", "--controller.settings.min_rollouts=5"],
        "min_rollouts",
    ),
    "a verifier that cannot be imported": (
        ["train", MODEL, "--data.verifier=nomodule:f"],
        "data.verifier='nomodule:f': a verifier worker ended with code 1",
    ),
    "a rank above the matrices'": (["train", MODEL, "--model.lora_rank=9999"], "model.lora_rank=9999: must be at most"),
    "a folder of benchmarks without benchmarks": (
        ["eval", "nowhere", "embedded", "--benchmark-folder", "x"],
        "--benchmark-folder does nothing without --benchmarks",
    ),
    "more prompts than problems": (
        [
            *("train", MODEL, "--data.train={problems}", "--train.prompts_per_step=7", "--controller.mean_rollouts=1"),
            "--mesh.data=1",
        ],
        "train.prompts_per_step=7: only 6 problems",
    ),
    "a row without an answer": (["train", MODEL, "--data.train={holes}"], "holes.jsonl, line 3: column 'answer'"),
    "a row that is not JSON": (["train", MODEL, "--data.train={garbled}"], "garbled.jsonl, line 2: is not JSON"),
    "missing problems": (["eval", "{tiny}", "absent.jsonl"], "absent.jsonl: does not exist"),
    "missing problems to train on": (
        ["train", MODEL, "--data.train=absent.jsonl"],
        "data.train: absent.jsonl: does not",
    ),
    "missing problems to plan for": (
        ["plan", MODEL, "--data.train=absent.jsonl"],
        "data.train: absent.jsonl: does not",
    ),
    "missing held-out problems of a plan": (
        ["plan", MODEL, "--eval.data=absent.jsonl"],
        "eval.data: absent.jsonl: does not exist",
    ),
    "a prompt that is too long": (["train", MODEL, "--data.max_prompt_tokens=2"], "more than the 2 allowed"),
    "more tokens than the model has positions": (
        ["train", MODEL, "--sampling.max_new_tokens=125"],
        "sampling.max_new_tokens=125: with prompts of up to",
    ),
    "a response longer than the model has positions": (
        ["eval", "{tiny}", "embedded", "--sampling.max_new_tokens=125"],
        "the model has 128 (max_position_embeddings",
    ),
    "low parameters under high compute": (["train", "--model.param_dtype=bfloat16"], "model.param_dtype='bfloat16'"),
    "a missing tokenizer": (["train", MODEL, "--model.tokenizer={tmp}"], "holds no tokenizer.json"),
    "an output that is a file": (["train", MODEL, "--run.output={problems}"], "problems.jsonl is a file)"),
    "an unknown command": (["trian"], "invalid choice: 'trian'"),
    "no command": ([], "COMMAND"),
    "a missing value": (["train", "--run.steps"], "--run.steps needs a value"),
    "a missing value before an option": (["train", "--run.steps", "--run.seed", "3"], "--run.steps needs a value"),
    "an unknown flag": (["train", "--fast"], "--fast"),
    "a stray word": (["train", "fast"], "fast"),
    "a missing argument": (["eval", "embedded"], "either a file of problems or --benchmarks is needed"),
    "two kinds of problems": (["eval", "embedded", "embedded", "--benchmarks=aime24"], "either a file of problems or"),
    "benchmarks without a folder": (["eval", "embedded", "--benchmarks=aime24"], "--benchmark-folder"),
    "an unknown benchmark": (
        ["eval", "embedded", "--benchmarks=aime2", "--benchmark-folder={tmp}"],
        "did you mean 'aime2",
    ),
    "a benchmark that is not there": (
        ["eval", "embedded", "--benchmarks=aime24", "--benchmark-folder={tmp}"],
        "holds no aime24.jsonl",
    ),
    "a folder without benchmarks": (
        ["eval", "{tiny}", "--benchmarks=all", "--benchmark-folder={tmp}"],
        "holds none of",
    ),
    "one evaluation to compare": (["compare-evals", "{tmp}"], "at least two"),
    "no evaluation to compare": (["compare-evals", "{tmp}", "{tmp}"], "is no evaluation"),
    "no evaluation to grade": (["regrade", "{tmp}"], "is no evaluation"),
    "an unknown verifier": (["train", "--data.verifier=maths"], "did you mean 'math'?"),
    "an evaluation template without a problem": (["train", "--eval.template=x"], "eval.template: 'x'"),
    "a report of nothing": (["report", "nowhere"], "nowhere"),
    "an option of a report": (["report", "x", "--run.steps", "3"], "unknown option --run.steps"),
    "no methods to compare": (["compare"], "compare.methods: names no method"),
    "a method with another budget": (
        ["compare", MODEL, "--compare.methods.uniform.controller.mean_rollouts=2"],
        "compare.methods.uniform: changes controller.mean_rollouts",
    ),
    "a method with other prompts": (
        ["compare", MODEL, "--compare.methods.uniform.data.train=x"],
        "compare.methods.uniform: changes data",
    ),
    "a method with more steps": (
        ["compare", MODEL, "--compare.methods.uniform.run.steps=7"],
        "compare.methods.uniform: changes run;",
    ),
    "a method with another evaluation": (
        ["compare", MODEL, "--compare.methods.uniform.eval.temperature=0.5"],
        "compare.methods.uniform: changes eval",
    ),
    "a method with another model": (
        ["compare", MODEL, "--compare.methods.uniform.model.random_init=3"],
        "compare.methods.uniform: changes model;",
    ),
    "a method named as a folder elsewhere": (
        ["compare", MODEL, "--compare.methods={{../uniform: }}"],
        "compare.methods: '../uniform' names a folder",
    ),
    "a key given twice in a file": (["train", "--config", "{twice}"], "'train' is given twice"),
    "a key given twice in a value": (["train", "--controller.settings={{k: 1, k: 2}}"], "'k' is given twice"),
    "a seed that does not fit": (["train", "--model.random_init=99999999999"], "model.random_init=99999"),
    "no output": (["train", "--run.output="], "run.output=''"),
    "an output below a file": (["train", MODEL, "--run.output={problems}/x"], "problems.jsonl is a file)"),
    "a report below a file": (["report", "{run}", "--out={problems}/x"], "not a folder that can be written"),
    "a field that training does not use": (
        ["train", "--compare.seeds=[1]"],
        "--compare.seeds does nothing in gdro train",
    ),
    "a field that comparing does not use": (["compare", "--run.seed=1"], "--run.seed does nothing in gdro compare"),
    "a field that evaluation does not use": (
        ["eval", "{tiny}", "embedded", "--train.kl_coef=0"],
        "--train.kl_coef does nothing in gdro eval",
    ),
    "how training samples, given to evaluation": (
        ["eval", "{tiny}", "embedded", "--sampling.temperature=0.5"],
        "--sampling.temperature does nothing in gdro eval",
    ),
    "a field that grading again does not use": (
        ["regrade", "{tmp}", "--data.verifier=math"],
        "--data.verifier does nothing in gdro regrade",
    ),
    "a method that is no section": (["compare", MODEL, "--compare.methods.uniform=3"], "compare.methods.uniform=3"),
    "an unknown method": (["compare", MODEL, "--compare.methods.unform="], "unknown rule 'unform'"),
    "seeds that repeat": (["compare", "--compare.seeds=[1, 1]"], "compare.seeds=[1, 1]: must be distinct"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, tmp_path, tiny_folder, problems, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("train:\n  learning_rat: 1e-4\n")
    (tmp_path / "twice.yaml").write_text("train: {kl_coef: 0.1}\nrun: {steps: 3}\ntrain: {learning_rate: 0.1}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run: {seed: 0}\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "broken.yaml").write_text("train: {learning_rate: [1\n")
    (tmp_path / "holes.jsonl").write_text('{"prompt": "1", "answer": "1"}\n\n{"prompt": "2"}\n')
    (tmp_path / "garbled.jsonl").write_text('{"prompt": "1", "answer": "1"}\n{"prompt": \n')
    places = {
        name.split(".")[0]: tmp_path / name
        for name in ("typo.yaml", "twice.yaml", "broken.yaml", "holes.jsonl", "garbled.jsonl", "run")
    }
    arguments, words = BAD[name]
    before = sorted(tmp_path.iterdir())
    code = invoke(*(a.format(tiny=tiny_folder, tmp=tmp_path, problems=problems, **places) for a in arguments))
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n") and printed.err.startswith("gdro")
    assert words in printed.err
    assert sorted(tmp_path.iterdir()) == before  # nothing was begun


def test_a_full_disk_is_one_line_and_a_fault(tmp_path, tiny_folder, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "config.yaml")

    monkeypatch.setattr(config_io, "save", full)
    assert invoke("train", f"--model.path={tiny_folder}", f"--run.output={tmp_path / 'run'}") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "gdro train: config.yaml: No space left on device"


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.EIO, 1)])
def test_what_the_system_says_of_a_file_is_one_line(number, code, tmp_path, tiny_folder, capsys, monkeypatch):
    """A folder that may not be read, say, which for some users none is."""
    read = pathlib.Path.read_text

    def refused(path: pathlib.Path, *rest: object, **more: object) -> str:
        if path == tiny_folder / "config.json":
            raise OSError(number, os.strerror(number), str(path))
        return read(path, *rest, **more)

    monkeypatch.setattr(pathlib.Path, "read_text", refused)
    assert invoke("export", tiny_folder, tmp_path / "out") == code
    assert capsys.readouterr().err == f"gdro export: {tiny_folder / 'config.json'}: {os.strerror(number)}\n"


def test_a_name_that_is_too_long_is_one_line(tmp_path, tiny_folder, capsys):
    for arguments in (("export", "x" * 300, tmp_path / "out"), ("export", tiny_folder, tmp_path / ("x" * 250))):
        assert invoke(*arguments) == 2
        printed = capsys.readouterr().err
        assert printed.endswith(": File name too long\n") and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def without_a_tensor(data: bytes) -> bytes:
    tensors = safetensors.numpy.load(data)
    del tensors["model.norm.weight"]
    return safetensors.numpy.save(tensors)


def of_no_known_kind(data: bytes) -> bytes:
    content = json.loads(data)
    content["model"]["type"] = "Nope"
    return json.dumps(content).encode()


def changed(**fields: object):
    return lambda data: json.dumps(json.loads(data) | fields).encode()


DAMAGED = {  # file, what happens to it, words of the line
    "weights cut short": ("model.safetensors", lambda data: data[:-100], "model.safetensors: truncated or not"),
    "empty weights": ("model.safetensors", lambda data: b"", "model.safetensors: truncated or not"),
    "a missing tensor": ("model.safetensors", without_a_tensor, "missing model.norm.weight"),
    "config cut short": ("config.json", lambda data: data[:40], "config.json: not valid JSON"),
    "config that is no object": ("config.json", lambda data: b"[]", "config.json: expected a JSON object, got list"),
    "config of bytes": ("config.json", lambda data: b"\xff\xfe\x00", "config.json"),
    "a switch for an eps": ("config.json", changed(rms_norm_eps=True), "config.json: rms_norm_eps=True: must be"),
    "a word for a number of no use": ("config.json", changed(initializer_range="big"), "initializer_range"),
    "layers that are no list": ("config.json", changed(layer_types=5), "config.json: layer_types=5: must be a list"),
    "another family": ("config.json", changed(model_type=None, architectures=["LlamaForCausalLM"]), "model_type=None"),
    "another head": ("config.json", changed(architectures=["Qwen3ForSequenceClassification"]), "architectures=['Qwen3"),
    "stop tokens outside": ("generation_config.json", changed(eos_token_id=[1, 128]), "stop tokens [128] are outside"),
    "too small a vocabulary": ("config.json", changed(vocab_size=20), "tokens, the model's vocabulary is 20"),
    "stop tokens cut short": ("generation_config.json", lambda data: b'{"eos_token_id": [', "generation_config.json: "),
    "stop tokens that are no object": (
        "generation_config.json",
        lambda data: b"[1]",
        "expected a JSON object, got list",
    ),
    "tokenizer cut short": ("tokenizer.json", lambda data: data[: len(data) // 2], "tokenizer.json: not valid JSON"),
    "an empty tokenizer": ("tokenizer.json", lambda data: b"", "tokenizer.json: not valid JSON"),
    "a tokenizer of no known kind": ("tokenizer.json", of_no_known_kind, "tokenizer.json: malformed"),
    "tokenizer settings cut short": (
        "tokenizer_config.json",
        lambda data: b'{"a',
        "tokenizer_config.json: not valid JSON",
    ),
}


@pytest.fixture
def no_parameters(monkeypatch):
    """No parameter is read, made or placed."""

    def forbidden(*_: object) -> None:
        raise AssertionError("parameters before all was checked")

    for name in ("_read", "_place", "_load_param"):
        monkeypatch.setattr(hf, name, forbidden)
    monkeypatch.setattr(qwen3, "init", forbidden)


@pytest.mark.parametrize("command", ["train", "compare", "eval", "export"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(
    name, command, tmp_path, tiny_folder, problems, capsys, no_parameters
):
    file, change, words = DAMAGED[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    whole = (model / file).read_bytes() if (model / file).is_file() else b"{}"
    (model / file).write_bytes(change(whole))
    before = sorted(tmp_path.iterdir())
    arguments = {
        "train": [
            f"--model.path={model}",
            f"--data.train={problems}",
            "--eval.data=null",
            f"--run.output={tmp_path}/x",
        ],
        "compare": [
            f"--model.path={model}",
            f"--data.train={problems}",
            "--eval.data=null",
            f"--compare.output={tmp_path}/x",
            "--compare.methods={uniform: }",
        ],
        "eval": [model, problems],
        "export": [model, tmp_path / "x"],
    }
    assert invoke(command, *arguments[command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"gdro {command}: ")
    assert words in printed.err
    assert sorted(tmp_path.iterdir()) == before


UNFIT = {  # what does not fit the model, none of it damaged
    "prompts beyond the positions": ["--sampling.max_new_tokens=125"],
    "an attention that cannot run": ["--model.attention=splash"],
    "a limit on prompts": ["--data.max_prompt_tokens=2"],
}


@pytest.mark.parametrize("command", ["train", "compare", "eval"])
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_the_model_is_found_before_its_parameters_are_read(
    name, command, tmp_path, tiny_folder, problems, capsys, no_parameters, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "train": [f"--model.path={tiny_folder}", f"--data.train={problems}"],
        "compare": [f"--model.path={tiny_folder}", f"--data.train={problems}", "--compare.methods={uniform: }"],
        "eval": [tiny_folder, problems],
    }
    assert (
        invoke(command, *arguments[command], *UNFIT[name], "--mesh.data=1" if command != "eval" else "--eval.k=1") == 2
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_where_an_export_cannot_go_is_found_before_parameters_are_read(tmp_path, tiny_folder, capsys, no_parameters):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("text")
    (tmp_path / "file").write_text("text")
    for place, words in (
        (tmp_path / "work", "holds thesis.tex"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", f"not a folder that can be written ({tmp_path}/file is a file)"),
        ("/proc/nowhere/x", "not a folder that can be written"),
    ):
        assert invoke("export", tiny_folder, place) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("command", ["train", "compare"])
def test_where_a_run_cannot_go_is_found_before_its_parameters_are_read(
    command, tmp_path, tiny_folder, problems, capsys, no_parameters
):
    out = tmp_path / "out"
    run = out if command == "train" else out / "uniform-seed0"
    run.mkdir(parents=True)

    def refused(place: object) -> str:
        more = ["--compare.methods={uniform: }", "--compare.seeds=[0]"] if command == "compare" else []
        field = "run.output" if command == "train" else "compare.output"
        arguments = [f"--model.path={tiny_folder}", f"--data.train={problems}", "--eval.data=null", "--mesh.data=1"]
        assert invoke(command, *arguments, "--train.prompts_per_step=3", *more, f"--{field}={place}") == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        return printed

    assert f"not a folder that can be written ({problems} is a file)" in refused(problems)
    assert "not a folder that can be written" in refused("/proc/nowhere")
    (run / "config.yaml").write_text("run: {seed: 5}\n")
    assert "holds a run of another configuration" in refused(out)
    (run / "config.yaml").unlink()
    (run / "model").mkdir()
    (run / "model" / "thesis.tex").write_text("text")
    assert "holds thesis.tex" in refused(out)
    (run / "model" / "thesis.tex").unlink()
    if command == "train":
        with filelock.FileLock(run / ".lock"):
            assert "another process is training in it" in refused(out)


def test_a_folder_for_weights_is_refused(tmp_path, tiny_folder, capsys, no_parameters):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    assert invoke("export", model, tmp_path / "x") == 2
    printed = capsys.readouterr().err
    assert "model.safetensors: cannot be opened" in printed and printed.count("\n") == 1


def test_bad_input_to_a_real_process(tmp_path):
    command = [sys.executable, "-m", "gdro_jax.cli", "train", "--model.path", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "gdro train: model.path='nowhere': no such folder; expected config.json and *.safetensors in it"
    ]


def test_a_fault_is_not_bad_input(monkeypatch, tiny_folder):
    """Anything unforeseen keeps its traceback, and the interpreter then exits with 1."""

    def broken(*parts: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(commands, "train", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        invoke("train", f"--model.path={tiny_folder}")


def test_a_verifier_that_fails_is_one_line_and_exit_code_1(monkeypatch, problems, capsys):
    def failing(fault: type[Exception]):
        def run(*parts: object) -> None:
            raise fault("step 3: half of the\nresponses")

        return run

    for fault in (rewards.UnscorableError, rewards.VerifierError, evaluation.NothingScorableError):
        monkeypatch.setattr(commands, "train", failing(fault))
        assert invoke("train") == 1
        assert capsys.readouterr().err == "gdro train: step 3: half of the responses\n"


@pytest.mark.slow
def test_an_evaluation_that_nothing_can_be_graded_in_is_one_line_and_exit_code_1(monkeypatch, problems, capsys):
    class Broken(ExactVerifier):
        def grade(self, responses, answers):
            return grades_of(["no mood to grade"] * len(responses))

    monkeypatch.setattr(inputs, "verifier", lambda config, name=None: Broken())
    settings = ["--eval.samples=1", "--eval.k=1", "--sampling.max_new_tokens=2", "--data.max_unscorable"]
    for limit, words in ((0.5, "100% of the responses could not be graded"), (1, "no response could be graded")):
        assert invoke("eval", "embedded", problems, *settings, limit) == 1
        printed = capsys.readouterr().err.splitlines()
        note, _, line = [line for line in printed if not line.endswith(" tokens")]
        assert note.startswith("nothing is kept; --out ") and line.startswith("gdro eval: ") and words in line


@pytest.mark.parametrize("command", ["train", "compare", "plan", "eval", "regrade"])
def test_help_names_every_field(command, capsys):
    assert invoke(command, "--help") == 0
    text = capsys.readouterr().out
    for section, fields in config_io.to_dict(config_io.load()).items():
        for field in fields:  # but for those that the command refuses
            assert (f"--{section}.{field} " in text) != cli._unused(command, f"{section}.{field}")
    assert "--data.verifier_workers  2" in text and ("--sampling.slots  null" in text) == (command != "regrade")


def test_general_help_names_every_command(capsys):
    assert invoke("--help") == 0
    text = capsys.readouterr().out
    first = {line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "}
    assert first >= {"train", "compare", "eval", "regrade", "compare-evals", "export", "report"}


def test_overrides_stand_anywhere(monkeypatch):
    seen = {}

    def evaluate(model, problems, names, folder, out, config, stop):
        seen.update(locals())
        return True

    monkeypatch.setattr(eval_commands, "evaluate", evaluate)
    orders = (
        ["eval", "--eval.samples", "9", "m", "--run.seed=4", "p", "--out", "o"],
        ["eval", "m", "p", "--out=o", "--eval.samples=9", "--run.seed", "4"],
        ["--run.seed", "4", "eval", "m", "p", "--out", "o", "--eval.samples", "9"],
        ["eval", "m", "--eval.samples", "9", "--out", "o", "p", "--run.seed=4"],
    )
    for arguments in orders:
        seen.clear()
        assert invoke(*arguments) == 0
        assert (seen["model"], seen["problems"], seen["out"]) == ("m", "p", "o")
        assert seen["config"].eval.samples == 9 and seen["config"].run.seed == 4


def test_the_second_signal_is_final(capfd):
    stop = cli._Stop("stopping")
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    said = "stopping, after what is being compiled or computed, which may take minutes; once more to stop at once"
    assert capfd.readouterr().err == f"\n{said}\n"
    assert stop() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stopped_command_exits_with_75(monkeypatch):
    monkeypatch.setattr(commands, "train", lambda config, stop: False)
    monkeypatch.setattr(commands, "compare", lambda config, stop: False)
    assert invoke("train") == 75 and invoke("compare") == 75


def test_a_run_says_that_it_compiles(monkeypatch, capsys):
    class Run:
        def __init__(self, config, parts, *more):
            self.step = parts.step

        def run(self, *more):
            sys.stderr.write("runs\n")
            return True

        def close(self):
            """Nothing to close."""

    monkeypatch.setattr(commands, "Trainer", Run)
    compiling = "joint  compiling a step's programs, which may take minutes"
    for step, said in ((0, [compiling]), (100, ["joint  has already made step 100 of 100"])):
        parts = SimpleNamespace(notes=("first prompt",), step=step)
        assert commands._run(Config(), parts, lambda: False, "joint")
        assert capsys.readouterr().err.splitlines() == ["joint  first prompt", *said, "runs"]


def test_eval(tmp_path, problems, capsys):
    out = tmp_path / "out"
    settings = ["--eval.samples=4", "--eval.k=2", "--sampling.max_new_tokens=4", "--run.seed=1"]
    assert invoke("eval", "embedded", problems, "--out", out, *settings) == 0
    printed = capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "problems.responses.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (out / "problems.problems.jsonl").read_text().splitlines()]
    assert [(r["problem"], r["rank"]) for r in rows] == [(p, r) for p in range(6) for r in range(4)]
    for row in rows:
        i = row["problem"]
        it = asked[i]
        assert it["prompt"] == f"2{i}+{i}=" and it["answer"] == str(20 + 2 * i) and it["stratum"] == "ab"[i % 2]
        assert row["scorable"] and row["score"] == (row["response"].strip() == it["answer"])
    correct = np.bincount([r["problem"] for r in rows], weights=[r["score"] for r in rows], minlength=6)
    assert correct.sum() > 12  # the base can add two digits and one
    strata = ["ab"[i % 2] for i in range(6)]
    want = evaluation.summarise(correct.astype(int), [4] * 6, strata, 2)
    assert {key: summary[key] for key in want} == json.loads(json.dumps(want))
    score = summary["sets"]["problems"]
    assert list(score["passes"]) == list("1234") and score["mean"]["value"] == pytest.approx(correct.mean() / 4)
    assert set(score["strata"]["stratum"]) == {"a", "b"} and (out / "scores.png").stat().st_size > 1000
    assert summary["overall"]["mean"] == pytest.approx(correct.mean() / 4) and summary["overall"]["n"] == 6
    assert printed.out == (out / "table.txt").read_text() and "24/24 responses" in printed.err
    assert "problems  first prompt, 5 tokens: '20+0='" in printed.err  # as the model gets it
    assert invoke("regrade", out) == 0 and json.loads((out / "summary.json").read_text()) == summary


def test_eval_says_how_many_prompts_it_left_out(tmp_path, tiny_folder, capsys):
    file, out = tmp_path / "long.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"prompt": "1" * n, "answer": "1"}) + "\n" for n in (2, 127, 3)))
    settings = ["--eval.samples=1", "--eval.k=1", "--sampling.max_new_tokens=2", "--data.overlong=drop"]
    assert invoke("eval", tiny_folder, file, "--out", out, *settings) == 0
    assert "1 of 3 prompts dropped as too long, above 126 tokens" in capsys.readouterr().err
    told = json.loads((out / "settings.json").read_text())["sets"]["long"]
    assert (told["problems"], told["dropped"]) == (2, 1)


def test_compare(tmp_path, tiny_folder, problems, capsys):
    """Two methods, two steps: same prompts and budget, a table, a report; run again it repeats nothing."""
    out = tmp_path / "out"
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "compare": {
                    "output": str(out),
                    "methods": {
                        "uniform": None,
                        "half": {"controller": {"name": "uniform"}, "train": {"max_skipped": 5}},
                    },
                },
                "model": {"path": str(tiny_folder)},
                "data": {"train": str(problems)},
                "eval": {"data": str(problems), "samples": 2, "k": 2},
                "sampling": {"max_new_tokens": 2, "gap_tolerance": None},
                "train": {"prompts_per_step": 3, "kl_coef": 0.0},
                "mesh": {"data": 1},
                "run": {"steps": 2, "save_model": False},
            },
            sort_keys=False,
        )
    )
    arguments = ("compare", "--config", tmp_path / "config.yaml", "--compare.seeds", "[4]")
    assert invoke(*arguments) == 0
    printed = capsys.readouterr()
    labels = [f"{method}-seed4" for method in ("uniform", "half")]
    listing = yaml.safe_load((out / "compare.yaml").read_text())
    assert listing["methods"] == ["uniform", "half"] and listing["seeds"] == [4]
    assert listing["runs"] == {label: {"method": label.split("-")[0], "seed": int(label[-1])} for label in labels}
    page = (out / "report.html").read_text()
    assert "uniform" in page and "half" in page and "uniform" in printed.out and str(out / "report.html") in printed.out
    logs = {label: (out / label / "metrics.jsonl").read_text() for label in labels}
    last = {label: json.loads(text.splitlines()[-1]) for label, text in logs.items()}
    assert {line["step"] for line in last.values()} == {2}
    assert {line["ledger"]["rollouts"] for line in last.values()} == {24}
    config = config_io.load(out / "half-seed4" / "config.yaml")
    assert (config.controller.name, config.train.max_skipped, config.run.seed) == ("uniform", 5, 4)
    first = {label: json.loads(text.splitlines()[1]) for label, text in logs.items()}
    one, two = first["uniform-seed4"], first["half-seed4"]  # the same prompts, sampled with the same keys
    assert one["strata"] == two["strata"] and one["response_length"] == two["response_length"]
    assert invoke(*arguments) == 0
    assert {label: (out / label / "metrics.jsonl").read_text() for label in labels} == logs
    assert "half-seed4  has already made step 2 of 2\n" in capsys.readouterr().err


def test_runs_of_a_comparison_differ_in_what_was_asked_only():
    config = config_io.load(
        None,
        [
            (
                "compare.methods",
                "{uniform: , joint: {controller: {settings: {prompt_ema: 0.5}}, train: {kl_coef: 0.1}}}",
            ),
            ("compare.seeds", "[0, 7]"),
            ("compare.output", "runs/x"),
            ("controller.settings.window", "9"),
        ],
    )
    runs = commands.comparison(config)
    assert list(runs) == ["uniform-seed0", "joint-seed0", "uniform-seed7", "joint-seed7"]
    joint = runs["joint-seed7"]
    assert joint.controller.name == "joint" and joint.controller.settings == {"window": 9, "prompt_ema": 0.5}
    assert runs["uniform-seed0"].controller.settings == {"window": 9}
    assert joint.train.kl_coef == 0.1 and runs["uniform-seed7"].train == config.train
    assert joint.run.seed == 7 and joint.run.output == os.path.join("runs", "x", "joint-seed7")
    assert joint.data == config.data and joint.eval == config.eval
    with pytest.raises(ConfigError, match=r"compare\.methods\.joint: unknown field in section train: 'kl'"):
        commands.comparison(config_io.load(None, [("compare.methods.joint.train.kl", "1")]))
