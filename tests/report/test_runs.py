"""Reading run folders: what is tolerated, and what is refused with the file and line."""

import numpy as np
import pytest
import yaml

from gdro_jax import report


def append(folder, text):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def test_a_run_is_what_its_folder_says(write_run):
    run = report.read_run(write_run("r", [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}], "joint", 3))
    assert (run.method, run.seed, run.num_steps, run.truncated) == ("joint", 3, 2, False)
    np.testing.assert_array_equal(run.scalars("reward"), [0.5, np.nan])
    np.testing.assert_array_equal(run.scalars("no", "such"), [np.nan, np.nan])
    assert run.last("reward") == 0.5
    assert run.setting("run", "method") == "joint"


@pytest.mark.parametrize("tail", ['{"step": 3, "rew', '{"step": 3, "name": "é'.encode()[:-1], "{"])
def test_an_unfinished_last_line_is_left_out(write_run, tail):
    folder = write_run("r", [{"step": 1}, {"step": 2}])
    append(folder, tail)
    run = report.read_run(folder)
    assert run.steps.tolist() == [1, 2]
    assert run.truncated
    assert any("cut off" in text for text in report.check([run]))


def test_a_finished_last_line_without_newline_counts(write_run):
    folder = write_run("r", [{"step": 1}])
    append(folder, '{"step": 2}')
    run = report.read_run(folder)
    assert run.steps.tolist() == [1, 2]
    assert not run.truncated


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 2, "rew', "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"reward": 1}', "step is None"),
        ('{"step": -1}', "step is -1"),
        ('{"step": "two"}', "step is 'two'"),
    ],
)
def test_a_bad_line_is_named(write_run, line, said):
    folder = write_run("r", [{"step": 1}])
    append(folder, f'{line}\n{{"step": 3}}\n')
    with pytest.raises(report.RunError, match=r"metrics\.jsonl:2: ") as error:
        report.read_run(folder)
    assert said in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_field_of_the_wrong_type_is_named(write_run):
    run = report.read_run(
        write_run("r", [{"step": 1}, {"step": 2, "reward": "high", "bins": {"share": 1.0, "weight": [1, "x"]}}])
    )
    with pytest.raises(report.RunError, match=r"metrics\.jsonl:2: reward is 'high', expected a number or null"):
        run.scalars("reward")
    with pytest.raises(report.RunError, match=r"metrics\.jsonl:2: bins\.share is '1\.0', expected a list"):
        run.vectors("bins", "share")
    with pytest.raises(report.RunError, match=r"metrics\.jsonl:2: bins\.weight is 'x'"):
        run.vectors("bins", "weight")


def test_vectors_have_gaps_and_one_width(write_run):
    folder = write_run(
        "r", [{"step": 0}, {"step": 1, "bins": {"share": [1.0, None]}}, {"step": 2, "bins": {"share": [0.25, 0.75]}}]
    )
    expected = [[np.nan, np.nan], [1.0, np.nan], [0.25, 0.75]]
    np.testing.assert_array_equal(report.read_run(folder).vectors("bins", "share"), expected)
    append(folder, '{"step": 3, "bins": {"share": [1, 2, 3]}}\n')
    with pytest.raises(report.RunError, match=r"metrics\.jsonl:4: .*a list of 2 numbers"):
        report.read_run(folder).vectors("bins", "share")


def test_non_finite_literals_are_gaps(write_run):
    folder = write_run("r", [{"step": 1}])
    append(folder, '{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1e999}\n')
    assert np.isnan(report.read_run(folder).scalars("loss")).all()


def test_a_resumed_run_replaces_the_steps_it_repeats(write_run):
    folder = write_run("r", [{"step": n, "reward": 0.1} for n in (1, 2, 3)] + [{"step": 2, "reward": 0.9}, {"step": 3}])
    run = report.read_run(folder)
    assert run.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(run.scalars("reward"), [0.1, 0.9, np.nan])


def test_what_is_missing_is_named(tmp_path, write_run):
    with pytest.raises(report.RunError, match="nowhere: no such folder"):
        report.read_run(tmp_path / "nowhere")
    with pytest.raises(report.RunError, match="no run to report"):
        report.read_comparison(tmp_path)
    folder = write_run("r", [])
    with pytest.raises(report.EmptyRunError, match="no complete step"):
        report.read_run(folder)
    (folder / "config.yaml").write_text("run: [unclosed")
    with pytest.raises(report.RunError, match=r"config\.yaml: not YAML"):
        report.read_run(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(report.RunError, match=r"config\.yaml: no such file"):
        report.read_run(folder)


def test_a_comparison_takes_its_labels_from_compare_yaml(tmp_path, write_run):
    write_run("c/published-seed0", [{"step": 1}], "rollout_gdro", 0)
    write_run("c/unborn-seed0", [], "uniform", 0)
    names = {"published-seed0": {"method": "published", "seed": 0}, "unborn-seed0": {"method": "uniform", "seed": 0}}
    (tmp_path / "c" / "compare.yaml").write_text(yaml.safe_dump({"runs": names | {"later-seed0": {}}}, sort_keys=False))
    with pytest.warns(RuntimeWarning, match="no complete step yet: unborn-seed0, later-seed0"):
        runs = report.read_comparison(tmp_path / "c")
    assert [(run.method, run.seed) for run in runs] == [("published", 0)]


def test_several_folders_are_one_comparison(tmp_path, write_run):
    a, b = write_run("a", [{"step": 1}], "uniform", 0), write_run("x/b", [{"step": 1}], "joint", 0)
    assert [run.method for run in report.read_comparison([a, tmp_path / "x"])] == ["uniform", "joint"]
    assert len(report.read_comparison([b, tmp_path / "x"])) == 1
    twin = write_run("twin", [{"step": 1}], "joint", 0)
    with pytest.raises(report.RunError, match="are both method 'joint', seed 0"):
        report.read_comparison([b, twin])
