"""Hugging Face folders in and out: every tensor equal, bad folders refused in one line before any device memory."""

import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from model_cases import BASE, CASES, config, make_model
from safetensors.numpy import load_file, save_file

from gdro_jax.models import config as config_module
from gdro_jax.models import hf, qwen3

DTYPES = ("float32", "bfloat16", "float16")
UNTIED = CASES["bias_untied_multi_head"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("models") / "base"
    hf.save(make_model(BASE), path)
    return path


@pytest.fixture
def folder(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy that a test may damage."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "model"))


def assert_same(got: qwen3.Qwen3, want: qwen3.Qwen3) -> None:
    assert got.config == want.config
    for name, array in want.arrays().items():
        assert got.arrays()[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(got.arrays()[name]), np.asarray(array), err_msg=name)


def refused(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one-line refusal of a folder; fails if a parameter was read or placed before it."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("device memory was taken before the folder was checked")

    with monkeypatch.context() as patch:
        for name in ("_load_param", "_place", "_read"):
            patch.setattr(hf, name, forbidden)
        with pytest.raises(hf.CheckpointError) as error:
            hf.load(path)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_tensors(path: pathlib.Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; `__` in a name stands for a dot."""
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("mesh", [None, (4, 2)], ids=["one device", "eight"])
def test_a_model_is_staged_a_few_rows_at_a_time(
    mesh: tuple[int, int] | None, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than the limit, or one row where a row is more, is on the host at a time; the result is the same."""
    sizes: list[int] = []
    read = hf._read

    def spy(*args: object) -> np.ndarray:
        part = read(*args)  # type: ignore[arg-type]
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(hf, "_read", spy)
    monkeypatch.setattr(hf, "_STAGED_BYTES", 1000)
    on = None if mesh is None else jax.make_mesh(mesh, ("fsdp", "tensor"))
    assert_same(hf.load(folder, mesh=on), make_model(BASE))
    assert max(sizes) == (32 * 48 * 4 if mesh is None else 31 * 8 * 4)  # a layer of q_proj; 31 rows of the embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cfg", [BASE, UNTIED], ids=["tied", "untied"])
def test_save_then_load_is_the_same_model(cfg: qwen3.Qwen3Config, dtype: str, tmp_path: pathlib.Path) -> None:
    model = make_model(cfg, dtype)
    hf.save(model, tmp_path / "new" / "model")
    assert_same(hf.load(tmp_path / "new" / "model", dtype), model)


def test_layout_is_the_published_one(saved: pathlib.Path) -> None:
    """Names and orientation of Qwen/Qwen3-*-Base: matrices are [out, in], a tied head is not stored."""
    tensors = load_file(saved / "model.safetensors")
    model = make_model(BASE)
    assert len(tensors) == 2 + 11 * BASE.num_layers
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (24, 32)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], np.asarray(model.k_proj[1]).T)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], np.asarray(model.down_proj[0]).T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], np.asarray(model.embed[...]))


def test_bfloat16_files_load_in_any_dtype(tmp_path: pathlib.Path) -> None:
    model = make_model(BASE, "bfloat16")
    hf.save(model, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    wide = {name: array.astype(jnp.float32) for name, array in model.arrays().items()}
    assert_same(hf.load(tmp_path / "model", "float32"), qwen3.Qwen3(BASE, wide))
    assert hf.load(tmp_path / "model", "float16").embed.dtype == jnp.float16


def test_shards_with_an_index_load_and_save(tmp_path: pathlib.Path) -> None:
    model = make_model(UNTIED)
    hf.save(model, tmp_path / "model", max_file_bytes=20_000)
    files = sorted(tmp_path.glob("model/*.safetensors"))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 25_000
    assert {file.name for file in files} == set(index["weight_map"].values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "model" / file)
    assert index["metadata"]["total_size"] == 4 * qwen3.num_params(UNTIED)
    assert_same(hf.load(tmp_path / "model"), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cfg", "limit"), [(BASE, 10**9), (UNTIED, 20_000)], ids=["one file", "sharded"])
def test_transformers_opens_it_with_every_tensor_equal(
    cfg: qwen3.Qwen3Config, limit: int, dtype: str, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = make_model(cfg, dtype)
    hf.save(model, tmp_path / "model", max_file_bytes=limit)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert theirs.dtype == getattr(torch, dtype)
    held = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    assert np.array_equal(held["lm_head.weight"], held["model.embed_tokens.weight"]) == cfg.tie_embeddings
    for name, spec in qwen3.param_specs(cfg).items():
        stored = np.asarray(getattr(model, name)[...].astype(jnp.float32))
        for layer in range(cfg.num_layers if spec.stacked else 1):
            ours = stored[layer] if spec.stacked else stored
            np.testing.assert_array_equal(held[spec.hf_name.format(layer=layer)], ours.T if spec.transpose else ours)


def test_what_transformers_saves_loads(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    model = make_model(CASES["rope_base_small"])
    hf.save(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(tmp_path.glob("theirs/*.safetensors"))) > 1
    assert_same(hf.load(tmp_path / "theirs"), model)


def test_a_stored_head_equal_to_the_embedding_is_tolerated(folder: pathlib.Path) -> None:
    embed = np.asarray(make_model(BASE).embed[...])
    edit_tensors(folder, lm_head__weight=embed)
    assert_same(hf.load(folder), make_model(BASE))


def test_a_stored_head_that_differs_is_refused(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = np.array(make_model(BASE).embed[...])
    head[-1, -1] += 1
    edit_tensors(folder, lm_head__weight=head)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(folder, monkeypatch)
    edit_tensors(folder, lm_head__weight=head[:-1])
    assert "lm_head.weight is (52, 32) but config.json needs (53, 32)" in refused(folder, monkeypatch)


def test_missing_unexpected_and_misshaped_tensors_are_named(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_tensors(
        folder,
        model__norm__weight=None,
        model__surprise=np.zeros(3, np.float32),
        model__layers__1__self_attn__q_norm__weight=np.zeros(7, np.float32),
    )
    text = refused(folder, monkeypatch)
    assert "missing model.norm.weight" in text
    assert "unexpected model.surprise" in text
    assert "model.layers.1.self_attn.q_norm.weight is (7,) but config.json needs (12,)" in text


def test_a_list_of_names_is_cut(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 9}))
    text = refused(folder, monkeypatch)
    assert "missing model.layers.2.input_layernorm.weight" in text and "and 74 more" in text


def test_an_unreadable_dtype_is_named(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_tensors(folder, model__norm__weight=np.ones(32, np.int8))
    assert "model.norm.weight has dtype I8, not one of BF16" in refused(folder, monkeypatch)


def test_missing_files_are_file_not_found(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in refused(folder / "nowhere", monkeypatch)
    (folder / "model.safetensors").rename(folder / "weights.bin")
    assert "no *.safetensors" in refused(folder, monkeypatch)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refused(folder, monkeypatch)
    with pytest.raises(FileNotFoundError):
        hf.load(folder)


def test_a_missing_shard_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.save(make_model(BASE), tmp_path / "model", max_file_bytes=9_000)
    shard = sorted(tmp_path.glob("model/*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(tmp_path / "model", monkeypatch)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}'])
def test_a_bad_index_is_refused(text: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "b")
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(folder, monkeypatch)


def test_one_tensor_in_two_files_is_refused(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    assert "b.safetensors: holds tensors that another file" in refused(folder, monkeypatch)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(keep: int, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: truncated or not a safetensors file" in refused(folder, monkeypatch)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, "model_type=None"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures=['Qwen3ForSequenceClassification']"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True"),
        ({"layer_types": 5}, "layer_types=5"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling factor=None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0}}, "rope_scaling: mscale not supported"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling: factor without a rope_type; 'linear' or 'yarn' is needed"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention without a rope_type"),
        ({"rope_parameters": [1]}, "rope_parameters=[1]: expected an object"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "differ; keep one of them",
        ),
        ({"original_max_position_embeddings": 16}, "original_max_position_embeddings=16: must stand in rope_scaling"),
    ],
)
def test_another_architecture_is_refused(
    change: dict[str, object], text: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    message = refused(folder, monkeypatch)
    assert text in message and "config.json" in message


def test_an_unknown_dtype_is_refused(saved: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="dtype='int8': must be one of float32, bfloat16, float16"):
        hf.load(saved, dtype="int8")


def test_saving_copies_the_tokenizer(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    wanted = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "generation_config.json": '{"eos_token_id": 3}',
    }
    for name, text in (wanted | {"notes.txt": "not ours", "config.json": "wrong"}).items():
        (source / name).write_text(text)
    hf.save(make_model(BASE), tmp_path / "model", tokenizer_from=source)
    assert {name: (tmp_path / "model" / name).read_text() for name in wanted} == wanted
    assert not (tmp_path / "model" / "notes.txt").exists()
    assert_same(hf.load(tmp_path / "model"), make_model(BASE))
    hf.save(make_model(BASE), tmp_path / "model", tokenizer_from=tmp_path / "model")  # over itself
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(hf.CheckpointError, match=r"no tokenizer\.json"):
        hf.save(make_model(BASE), tmp_path / "other", tokenizer_from=saved)
    assert not (tmp_path / "other").exists()


def test_saving_replaces_a_checkpoint_as_a_whole(tmp_path: pathlib.Path) -> None:
    hf.save(make_model(UNTIED), tmp_path / "model", max_file_bytes=20_000)
    hf.save(make_model(BASE), tmp_path / "model")
    assert sorted(p.name for p in tmp_path.glob("model/*")) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same(hf.load(tmp_path / "model"), make_model(BASE))


def test_saving_never_removes_what_it_would_not_write(tmp_path: pathlib.Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("text")
    with pytest.raises(hf.CheckpointError, match=r"thesis\.tex"):
        hf.save(make_model(BASE), tmp_path / "work")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "text"


def test_a_full_disk_is_an_error_of_the_system(tmp_path: pathlib.Path) -> None:
    """The library that writes tensors raises its own, which nothing above would know for what it is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            hf.save(make_model(UNTIED), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path.resolve())
    assert not list(tmp_path.iterdir())


def test_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path).name == "mounted")
    with pytest.raises(hf.CheckpointError, match="mounted: is a mount point"):
        hf.save(make_model(BASE), tmp_path / "mounted")
    assert [p.name for p in tmp_path.iterdir()] == ["mounted"]


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        hf.save(make_model(UNTIED), folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert_same(hf.load(folder), make_model(BASE))


def test_config_round_trip_and_defaults_of_transformers() -> None:
    for cfg in CASES.values():
        assert qwen3.Qwen3Config.from_hf(cfg.to_hf()) == cfg
    raw = config().to_hf()
    for name in ("head_dim", "tie_word_embeddings", "rope_theta", "attention_bias"):
        del raw[name]
    cfg = qwen3.Qwen3Config.from_hf(raw)
    assert (cfg.head_dim, cfg.tie_embeddings, cfg.rope_theta, cfg.attention_bias) == (128, False, 10_000.0, False)
    assert (
        qwen3.Qwen3Config.from_hf(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_theta
        == 7
    )


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_configuration_that_is_written(name: str, tmp_path: pathlib.Path) -> None:
    """Without torch too: every field means there what it means here."""
    cfg = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf() | {"torch_dtype": "bfloat16"}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3Config" and theirs.architectures == ["Qwen3ForCausalLM"]
    assert set(theirs.layer_types) == {"full_attention"} and theirs.hidden_act == "silu"
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"
    assert qwen3.Qwen3Config.from_hf(theirs.to_dict()) == cfg
    for theirs_name, ours in config_module._HF_FIELDS.items():
        assert getattr(theirs, theirs_name) == getattr(cfg, ours), ours


KILLED = """
import os, pathlib, sys, numpy as np
from gdro_jax.models import hf
from gdro_jax.models.config import param_specs, stored_shape
from conftest import TINY

target = pathlib.Path(sys.argv[1])
STEPS = [(os, "fsync"), (hf, "_exchange"), (pathlib.Path, "rename"), (hf.shutil, "rmtree")]
if sys.argv[2] == "renames":
    hf._exchange = lambda a, b: False
real = {name: getattr(owner, name) for owner, name in STEPS}

def save(value, most, die_at=None):
    calls = 0
    def counted(name):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os._exit(9)
            return real[name](*args, **kwargs)
        return call
    for owner, name in STEPS:
        setattr(owner, name, counted(name))
    params = ((n, np.full(stored_shape(TINY, s), value, np.float32)) for n, s in param_specs(TINY).items())
    hf.write(TINY, "float32", params, target, max_file_bytes=most)
    for owner, name in STEPS:
        setattr(owner, name, real[name])
    return calls

def held():
    return [sorted({float(x) for _, a in hf.read_params(p, "float32") for x in (a.min(), a.max())})
            for p in target.parent.iterdir() if p.name == "model"]

save(0.0, 10**9)
points = save(0.0, 20_000)
for point in range(1, points + 1):
    child = os.fork()
    if child == 0:
        save(float(point), 20_000, point)
        os._exit(0)
    os.waitpid(child, 0)
    print(point, held())
    save(0.0, 10**9)
    assert held() == [[0.0]] and [p.name for p in target.parent.iterdir()] == ["model"]
"""


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_a_save_that_is_killed_leaves_one_whole_folder(how: str, tmp_path: pathlib.Path) -> None:
    """At every point where names or the disk are touched; what it left is gone after the next save."""
    (tmp_path / "at").mkdir()
    paths = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "at" / "model"), how],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(seen) > 5
    missing = [point for point, found in seen if found == "[]"]
    assert len(missing) == (0 if how == "exchange" else 1)  # between the two renames
    for point, found in seen:
        assert found in ("[[0.0]]", f"[[{float(point)}]]", *(["[]"] if how == "renames" else [])), (point, found)
    assert {found for _, found in seen} > {"[[0.0]]"}  # some died after the exchange
