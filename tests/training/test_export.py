"""`gdro export`: the policy of a run as a folder that opens elsewhere, from its checkpoints alone."""

import contextlib
import json
import pathlib
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from gdro_jax import cli
from gdro_jax.models import hf, qwen3
from gdro_jax.models.checkpoint import CheckpointError
from gdro_jax.training.checkpoint import Checkpoints
from gdro_jax.training.export import export, save_policy


@pytest.fixture
def run(configure, launch) -> tuple[pathlib.Path, qwen3.Qwen3]:
    """A run in bfloat16 over float32 parameters, its checkpoint 0 changed from the model it began with."""
    config = configure("model.dtype=bfloat16", "train.kl_coef=0")
    trainer = launch(config)
    model = jax.tree.map(lambda x: x * 1.5, trainer.state.learner.model)
    trainer.state = trainer.state._replace(learner=trainer.state.learner._replace(model=model))
    trainer.save()
    pathlib.Path(config.data.train).unlink()  # the data need not be there
    return pathlib.Path(config.run.output), model


def assert_equal(got: qwen3.Qwen3, want: dict[str, jax.Array], dtype: str) -> None:
    for name, array in want.items():
        np.testing.assert_array_equal(got.arrays()[name], array.astype(dtype), err_msg=name)


def test_a_run_is_exported_in_the_dtype_it_computes_in(run, tmp_path, tiny_folder) -> None:
    folder, model = run
    out = export(str(folder), str(tmp_path / "out"))
    assert hf.stored_dtype(out) == "bfloat16"
    assert_equal(hf.load(out, "bfloat16"), model.arrays(), "bfloat16")
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 1
    assert qwen3.Qwen3Config.from_hf(transformers.AutoConfig.from_pretrained(out).to_dict()) == model.config
    assert len(transformers.AutoTokenizer.from_pretrained(out)) <= model.config.vocab_size
    assert (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


def test_transformers_opens_an_export_in_shards_with_every_tensor_equal(run, tmp_path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")

    folder, model = run
    at = str(folder / "checkpoints" / "0")
    out = export(at, str(tmp_path / "out"), dtype="float32", max_file_bytes=9_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    held, specs = theirs.state_dict(), qwen3.param_specs(model.config)
    assert theirs.generation_config.eos_token_id == 1
    assert len(transformers.AutoTokenizer.from_pretrained(out)) <= model.config.vocab_size
    for name, array in model.arrays().items():
        for layer in range(model.config.num_layers if specs[name].stacked else 1):
            ours = np.asarray(array[layer] if specs[name].stacked else array)
            ours = ours.T if specs[name].transpose else ours
            np.testing.assert_array_equal(held[specs[name].hf_name.format(layer=layer)].numpy(), ours, err_msg=name)


def test_a_hugging_face_folder_keeps_its_dtype_and_its_stops(tmp_path, tiny_folder, tiny_model) -> None:
    out = export(str(tiny_folder), str(tmp_path / "same"))
    assert_equal(hf.load(out), tiny_model.arrays(), "float32")
    half = export(str(out), str(tmp_path / "half"), dtype="bfloat16")
    again = export(str(half), str(tmp_path / "again"), max_file_bytes=5_000)
    assert_equal(hf.load(again, "bfloat16"), tiny_model.arrays(), "bfloat16")
    assert hf.load(again).embed[...].dtype == jnp.float32 and hf.stored_dtype(again) == "bfloat16"
    names = ("generation_config.json", "tokenizer.json")
    assert all((again / n).read_bytes() == (tiny_folder / n).read_bytes() for n in names)


BAD = (
    ("nowhere {out}", "nowhere: no such folder"),
    ("{run}/checkpoints/7 {out}", "no checkpoint 7; there are 0"),
    ("{run} {run}", "which is no checkpoint file; refusing to replace it"),
    ("{run}/checkpoints {out}", "holds neither config.yaml, as a run does, nor config.json"),
    ("{run} {out} --dtype int8", "invalid choice: 'int8'"),
    ("{run} {out} --max-file-bytes 0", "--max-file-bytes=0: must be at least 1"),
    ("{run} {out} --run.steps 3", "unknown option --run.steps"),
)


def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys) -> None:
    for arguments, text in BAD:
        try:
            code = cli.main(["export", *arguments.format(run=run[0], out=tmp_path / "out").split()])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        assert code == 2 and text in printed.err and printed.err.count("\n") == 1, arguments
        assert not (tmp_path / "out").exists()
    assert cli.main(["export", str(run[0]), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"


def bad(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line with which an export is refused."""
    assert cli.main(["export", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.out == ""
    return printed.err


def test_the_ends_of_a_text_and_generation_settings_are_those_of_the_model(
    configure, launch, tmp_path, tiny_folder
) -> None:
    """An id that config.json alone declares is kept, and a tokenizer from elsewhere brings no settings of its own."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"eos_token_id": [1, 9]}))
    (model / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    out = export(str(model), str(tmp_path / "out"))
    wanted = {"eos_token_id": [1, 7, 9], "temperature": 0.6}
    assert json.loads((out / "generation_config.json").read_text()) == wanted

    elsewhere = shutil.copytree(tiny_folder, tmp_path / "tokenizer")
    (elsewhere / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.1}')
    trainer = launch(configure(f"model.path={model}", f"model.tokenizer={elsewhere}", "run.steps=1"))
    trainer.save()
    out = export(str(tmp_path / "run"), str(tmp_path / "of run"))
    assert json.loads((out / "generation_config.json").read_text()) == wanted
    save_policy(trainer._policy(), tmp_path / "saved", trainer.config.model, trainer.parts.policy.stop_tokens)
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == wanted


def test_tensors_of_several_dtypes_are_changed_only_if_one_is_asked_for(tmp_path, tiny_folder, capsys) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {n: x if "norm" in n else x.astype(jnp.bfloat16) for n, x in tensors.items()}, model / "model.safetensors"
    )
    printed = bad(capsys, model, tmp_path / "out")
    assert "norm.weight of F32" in printed and "of BF16" in printed and "give one with --dtype" in printed
    assert not (tmp_path / "out").exists()
    export(str(model), str(tmp_path / "out"), dtype="bfloat16")
    assert hf.stored_dtype(tmp_path / "out") == "bfloat16"


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, "float32"), (1e39, "bfloat16")])
def test_numbers_that_are_not_finite_are_refused(value, dtype, tmp_path, tiny_folder, capsys) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float64)
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors")
    printed = bad(capsys, model, tmp_path / "out", "--dtype", dtype)
    assert f"{name}: 1 of {tensors[name].size} numbers are not finite in {dtype}" in printed
    assert {entry.name for entry in tmp_path.iterdir()} == {"model"}


def test_a_base_that_became_another_and_a_checkpoint_without_its_arrays_are_named(
    configure, launch, tmp_path, tiny_folder, capsys
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    trainer = launch(configure(f"model.path={model}"))
    trainer.save()
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    printed = bad(capsys, tmp_path / "run", tmp_path / "out")
    assert "does not fit the config.json of the run's model: .learner.model.lm_head.value is missing" in printed
    (model / "config.json").write_text(json.dumps(raw | {"intermediate_size": 40}))
    assert "gate_proj.value is (2, 32, 48), not (2, 32, 40) and 2 more" in bad(capsys, tmp_path / "run", tmp_path / "o")
    (model / "config.json").write_text(json.dumps(raw))
    arrays = tmp_path / "run" / "checkpoints" / "0" / "arrays"
    shutil.rmtree(arrays)
    assert "holds no arrays" in bad(capsys, tmp_path / "run", tmp_path / "out")
    arrays.mkdir()
    assert "holds no arrays" in bad(capsys, tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_removed_from_a_checkpoint_is_one_line(configure, launch, tmp_path, capsys):
    """Resuming and exporting say what cannot be read; an export needs no counters."""
    trainer = launch(configure())
    trainer.save()
    trainer.close()
    state, run, refused = trainer.state, tmp_path / "run", set()
    step = run / "checkpoints" / "0"
    good = shutil.copytree(step, tmp_path / "good")
    for path in map(
        pathlib.Path, ("counters", "arrays", "arrays/d", "arrays/manifest.ocdbt", "arrays/ocdbt.process_0")
    ):
        shutil.rmtree(step)
        shutil.copytree(good, step)
        shutil.rmtree(step / path) if (step / path).is_dir() else (step / path).unlink()
        try:
            with contextlib.closing(Checkpoints(run / "checkpoints", 1)) as again:
                jax.tree.map(np.testing.assert_array_equal, again.restore(0, state)[0].learner, state.learner)
        except CheckpointError as error:
            refused.add(str(path))
            assert "\n" not in str(error) and f"{step}: cannot be read (" in str(error), path
        if str(path) != "counters":
            assert f"{step}: " in bad(capsys, run, tmp_path / "out")
        else:
            export(str(run), str(tmp_path / "out"))
            assert_equal(hf.load(tmp_path / "out"), state.learner.model.arrays(), "float32")
    assert len(refused) == 5


def test_an_export_goes_parameter_by_parameter_on_the_host(run, tmp_path, monkeypatch) -> None:
    """Nothing is put on a device; at most the parameter that was read before is still held."""
    held: list[weakref.ref] = []
    given = hf.refuse_not_finite

    def one_at_a_time(config: qwen3.Qwen3Config, params):
        for name, array in given(config, params):
            assert isinstance(array, np.ndarray) and sum(ref() is not None for ref in held) <= 1
            held.append(weakref.ref(array))
            yield name, array
            del array

    monkeypatch.setattr(hf, "refuse_not_finite", one_at_a_time)
    for name in ("device_put", "make_array_from_single_device_arrays"):
        monkeypatch.setattr(jax, name, lambda *_, **__: pytest.fail("a parameter on a device"))
    out = export(str(run[0]), str(tmp_path / "out"), max_file_bytes=1)
    assert len(held) == len(run[1].arrays())
    monkeypatch.undo()
    assert_equal(hf.load(out, "bfloat16"), run[1].arrays(), "bfloat16")


@pytest.mark.slow
def test_what_adapters_make_is_rounded_to_the_dtype_asked_for_alone(configure, launch, tmp_path) -> None:
    low = ("model.dtype=bfloat16", "model.lora_rank=2", "model.lora_alpha=4", "train.kl_coef=0")
    trainer = launch(configure(*low, "run.steps=1"))
    trainer.one_step()
    trainer.save()
    whole, half = (
        hf.load(export(str(tmp_path / "run"), str(tmp_path / dtype), dtype=dtype), dtype).arrays()
        for dtype in ("float32", "bfloat16")
    )
    assert_equal(qwen3.working(trainer._policy()), half, "bfloat16")
    factors, base = trainer.state.learner.model.arrays, trainer.reference.arrays()
    want = np.asarray(base["up_proj"], np.float32) + 2.0 * np.einsum(
        "lir,lro->lio", np.asarray(factors["up_proj_a"]), np.asarray(factors["up_proj_b"])
    )
    np.testing.assert_allclose(whole["up_proj"], want, atol=1e-6)
    assert np.abs(want - np.asarray(half["up_proj"], np.float32)).max() > 1e-6
