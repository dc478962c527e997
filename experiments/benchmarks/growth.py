"""How the training step's time and memory grow with rows, length, vocabulary and depth, and a figure of it.

    python experiments/benchmarks/growth.py measure [--axes AXIS ...]   # prints one JSON line a size
    python experiments/benchmarks/growth.py plot                        # results/growth.jsonl -> docs/growth.svg

Every size is a fresh process of `train_step.py growth`, one axis scaled at a time. The figure shows both next to the
floating-point operations of the same sizes, all relative to factor 1: what grows no faster than the work lies on or
under the work's line.
"""

import argparse
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "growth.jsonl"
FIGURE = HERE.parents[1] / "docs" / "growth.svg"
AXES = {"rollouts": "rows", "length": "response tokens", "vocabulary": "vocabulary", "layers": "layers"}
FACTORS = ("0.5", "1", "2", "4")


def measure(axes: list[str]) -> None:
    for axis in axes:
        for factor in FACTORS:
            command = [sys.executable, str(HERE / "train_step.py"), "growth", "--no-check", "--repeats", "3"]
            subprocess.run([*command, "--scale", f"{axis}={factor}"], check=True)


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "growth"  # the same bytes from the same figures
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 3), sharey=True, layout="constrained")
    kinds = {
        "flops": ("work", "0.6", "--", ""),
        "cpu_s": ("time", "C0", "-", "o"),
        "peak_rss_mib": ("memory", "C1", "-", "s"),
    }
    for panel, (axis, name) in zip(panels, AXES.items(), strict=True):
        found = {float(x["scale"].partition("=")[2]): x for x in lines if x["scale"].startswith(f"{axis}=")}
        factors = sorted(found)
        for key, (label, color, style, marker) in kinds.items():
            values = [found[f][key] / found[1.0][key] for f in factors]
            panel.plot(factors, values, color=color, linestyle=style, marker=marker, label=label)
        panel.set(xscale="log", yscale="log", title=f"{name} ({found[1.0][axis] if axis != 'rollouts' else 32:,} at 1)")
        panel.set_xticks(factors, [f"{f:g}" for f in factors], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"], minor=False)
        panel.set_yticks([], minor=True)
        panel.grid(color="0.9")
        panel.set_xlabel("factor")
    panels[0].set_ylabel("relative to factor 1")
    panels[0].legend(frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "plot"))
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    known = parser.parse_args()
    if known.what == "measure":
        measure(known.axes)
    else:
        plot()


if __name__ == "__main__":
    main()
