"""`gdro export`: the policy of a run as a folder that opens elsewhere, from its checkpoints alone."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax import cli
from gdro_jax.models import hf, qwen3
from gdro_jax.training.export import export


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
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


def test_transformers_opens_an_export_in_shards_with_every_tensor_equal(run, tmp_path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    import transformers

    folder, model = run
    at = str(folder / "checkpoints" / "0")
    out = export(at, str(tmp_path / "out"), dtype="float32", max_file_bytes=9_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    held, specs = theirs.state_dict(), qwen3.param_specs(model.config)
    assert theirs.generation_config.eos_token_id == [1]
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
