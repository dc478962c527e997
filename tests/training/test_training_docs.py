"""The tables of docs/training.md are the figures that were measured, and those of the shipped configurations."""

import json
import pathlib
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
DOCS = (ROOT / "docs" / "training.md").read_text()


def table(header: str) -> list[list[str]]:
    """The rows of the table under a header line."""
    lines = DOCS[DOCS.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def test_the_published_steps_on_tpu_slices() -> None:
    """Each line is of a configuration as it is shipped now."""
    updates, samplers = {}, {}
    for line in results("step_compile.jsonl"):
        if line["topology"] == "v5e:8x8":
            (samplers if line.get("program") == "sampler" else updates)[line["model"]] = line
        config = yaml.safe_load((ROOT / "experiments" / "configs" / line["config"]).read_text())
        for field, value in line["changes"].items():
            section, name = field.split(".")
            assert str(config[section][name]) == value
        mesh = {"tensor": 1} | config["mesh"]
        assert line["mesh"] == mesh | {"data": 64 // mesh["fsdp"] // mesh["tensor"]}
        if line.get("program") != "sampler":
            pieces = config["train"]["minibatches"] * config["train"]["microbatches"] * line["shape"]["shards"]
            assert line["fits"] and line["shape"]["pieces"] == pieces
            assert (line["shape"]["packed"] is not None) == ("attention_tile" in config["train"])
    for model, *cells in table("| model | data x fsdp x tensor |"):
        update, sampler = updates[model]["gib"], samplers[model]
        config = yaml.safe_load((ROOT / "experiments" / "configs" / updates[model]["config"]).read_text())
        train, mesh = config["train"], updates[model]["mesh"]
        assert cells[0] == f"{mesh['data']} x {mesh['fsdp']} x {mesh['tensor']}"
        assert cells[1] == f"{train['microbatches']}, tiles of {train['attention_tile']}"
        assert cells[2] == str(config["sampling"]["slots"])
        assert cells[3] == f"{update['total']:.1f}"
        assert cells[4:] == [f"{sampler[name]['gib']['total']:.1f}" for name in ("start", "segment", "growing")]
        assert all(sampler[name]["fits"] for name in ("start", "segment", "growing"))


def test_the_published_updates_on_each_kind_of_chip() -> None:
    lines = {
        (line["model"], line["topology"]): line
        for line in results("step_compile.jsonl")
        if line["program"] == "update" and not line["changes"]
    }
    header = "| model | v5e:8x8, 15.75 GiB | v6e:8x8, 32 GiB | v5p:4x4x4, 95 GiB |"
    chips = [column.split(", ") for column in header.strip("| ").split(" | ")[1:]]
    rows = table(header)
    assert [row[0] for row in rows] == ["1.7B", "4B", "8B"]
    for model, *cells in rows:
        for (topology, memory), cell in zip(chips, cells, strict=True):
            line = lines[model, topology]
            assert memory == f"{line['memory_gib']:g} GiB" and line["fits"]
            assert cell == f"{line['gib']['total']:.1f}; {line['seconds_at_peak']:.1f} s"


def test_padding_of_the_published_steps() -> None:
    """Within 15 % as they are shipped, prompts included."""
    lines = results("packing_published.jsonl")
    for row, line in zip(table("| model, `mesh.tensor`, mean length |"), lines, strict=True):
        padded, small, large = (line[name] for name in ("padded", "tiles of 128", "tiles of 256"))
        cells = [f"{line['model']}, {line['tensor']}, {line['mean']}"]
        for share in ("of_flops", "of_all_flops"):
            cells.append(", ".join(f"{x[share]:.0%}"[:-1] for x in (padded, small, large)) + " %")
        work = large["all_flops_forward"] / padded["all_flops_forward"]
        assert row == [*cells, percent(large["prompts_share"]), f"{work:.2f}"]
        file = f"qwen3_{line['model'].lower().replace('.', '_')}_dapo.yaml"
        config = yaml.safe_load((ROOT / "experiments" / "configs" / file).read_text())
        assert config["train"]["attention_tile"] == 256
        if config["mesh"]["tensor"] == line["tensor"]:
            assert large["of_all_flops"] <= 0.15


def test_padding_of_streams() -> None:
    padding = results("packing.json")[0]["padding"]
    for setting, *cells in table("| `attention_tile`, `microbatches` | padding of tokens |"):
        name = "padded" if setting == "off" else "tiles of {}, {} microbatches".format(*setting.split(", "))
        got = padding[name]
        assert cells[:3] == [percent(got[kind]) for kind in ("of_tokens", "of_pairs", "of_flops")]


def test_padding_on_a_mesh() -> None:
    rows = table("| shards, rows, `microbatches` | padding of tokens |")
    for row, line in zip(rows, results("packing_mesh.jsonl"), strict=True):
        middle = line["tiles of 32"]
        flops = ", ".join(f"{line[f'tiles of {n}']['of_flops']:.0%}"[:-1] for n in (16, 32, 64))
        setting = f"{line['shards']}, {line['rows']}, {line['microbatches']}"
        assert row == [setting, percent(middle["of_tokens"]), percent(middle["of_pairs"]), f"{flops} %"]


def test_time_and_memory_next_to_the_peer() -> None:
    found: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for line in results("training.jsonl"):
        if "peak_rss_mib" in line:
            found.setdefault(line["workload"], ([], []))["lib" in line].append(line)
    pairs = [pair for workload in ("W1b", "W2") for pair in zip(*found[workload], strict=True)]
    rows = table("| | JAX | matrix rate | share of it | seconds | Tunix | ratio | asked |")
    for row, (ours, theirs) in zip(rows, pairs, strict=True):
        assert row[0] == f"{ours['workload']}, {ours['microbatches']} microbatches"
        assert ours["cores"] == theirs["cores"] == 2  # as the text says
        assert ours["jax"] == theirs["jax"] == row[1] and ours["machine"] == theirs["machine"]
        assert row[2:4] == [f"{ours['matrix_flops_per_s'] / 1e9:.0f}", f"{ours['share_of_matrix_rate']:.2f}"]
        seconds, memory = (ours["median_s"], theirs["median_s"]), (ours["peak_rss_mib"], theirs["peak_rss_mib"])
        assert row[4:7] == [*(f"{s:.1f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}"]
        assert row[8:11] == [f"{memory[0]:,.0f}", f"{memory[1]:,.0f}", f"{memory[0] / memory[1]:.2f}"]
    apart = max(ours.get("difference_from_naive") or 0 for ours, _ in pairs)
    assert f"at most {apart:.1e} apart".replace("e-0", "e-") in " ".join(DOCS.split())


def test_what_a_kernel_for_the_head_could_win() -> None:
    rows = table("| model, `mesh.tensor`, chip | products |")
    for row, line in zip(rows, results("head_roofline.jsonl"), strict=True):
        chunks = [line[f"chunk_{chunk}"] for chunk in (256, 512, 1024, 4096)]
        milliseconds = [chunks[0]["seconds_arithmetic"], *(chunk["seconds_memory"] for chunk in chunks)]
        assert row[0] == f"{line['model']}, {line['tensor']}, {line['chip']}"
        assert row[1:] == [f"{1000 * seconds:.1f}" for seconds in milliseconds]
