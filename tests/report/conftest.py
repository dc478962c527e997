"""Synthetic run folders: a caricature of training, in the layout that the trainer writes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

MakeRun = Callable[..., Path]
MakeComparison = Callable[..., Path]


def clean(value):
    """Non-finite numbers become null, arrays become lists, as the trainer's writer does."""
    if isinstance(value, dict):
        return {key: clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [clean(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def write_records(folder: Path, records: Sequence[dict], method="uniform", seed=0, run_steps=None, **sections) -> Path:
    """A run folder of exactly these records."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = {"steps": run_steps} if run_steps is not None else {}
    config = {"run": {"method": method, "seed": seed, **planned}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(clean(record)) + "\n" for record in records))
    return folder


def evaluation(strata: dict[str, tuple[float, float]], n=128) -> dict:
    means = [mean for mean, _ in strata.values()]
    worst = min(strata, key=lambda name: strata[name][0])
    return {
        "k": 8,
        "samples": 8,
        "overall": {"mean": np.mean(means), "pass": np.mean([p for _, p in strata.values()]), "n": n * len(strata)},
        "strata": {name: {"mean": mean, "pass": passed, "n": n} for name, (mean, passed) in strata.items()},
        "worst": {"stratum": worst, "mean": strata[worst][0]},
    }


def simulate(
    method: str, seed: int, *, steps: int, bins: int, strata: Sequence[str], eval_every: int, rollouts_per_step: int
) -> list[dict]:
    """Prompts of several levels, learned at a speed that weights and rollouts raise for the hard ones."""
    rng = np.random.default_rng([seed, bins, steps])
    noise = np.random.default_rng([seed, sum(map(ord, method))])
    level = np.linspace(-3.2, 2.2, len(strata)) + 0.08 * rng.normal(size=len(strata))
    weighs, moves = method in ("prompt_gdro", "joint"), method in ("rollout_gdro", "joint")
    records, mu, tokens = [], 0.0, 0

    def evaluated() -> dict:
        p = 1 / (1 + np.exp(-level)) * 0.97
        p = np.clip(p + 0.015 * noise.normal(size=p.size), 0.001, 0.999)
        return evaluation(
            {name: (float(v), float(1 - (1 - v) ** 8 * (0.7 + 0.6 * v))) for name, v in zip(strata, p, strict=True)}
        )

    ledger = {"rollouts": 0, "tokens": 0, "scored": 0, "slot_steps": 0, "seconds": 0.0}
    if eval_every:
        records.append({"step": 0, "eval": evaluated(), "ledger": dict(ledger)})
    for step in range(1, steps + 1):
        prompt_level = rng.normal(0.3, 0.35, size=128) + rng.choice(level, size=128)
        rate = 1 / (1 + np.exp(-prompt_level))
        bin_of = np.minimum((rate * bins).astype(int), bins - 1)
        count = np.bincount(bin_of, minlength=bins)
        share = count / count.sum()
        present = count > 0
        middle = (np.arange(bins) + 0.5) / bins
        w = np.exp(1.3 * (1 - middle)) if weighs else np.ones(bins)
        w = w / (w * share).sum()
        std = np.sqrt(middle * (1 - middle))
        n = 4 * std / (share * std).sum() if moves else np.full(bins, 4.0)
        q = w * share / (w * share).sum()
        effective = float(np.exp(-(q[present] * np.log(q[present])).sum()))
        wse, wse_uniform = (share * std / np.sqrt(n)).sum(), (share * std / 2).sum()
        push = 0.02 * (1 + (0.8 * np.exp(-level) / (1 + np.exp(-level)) if weighs else 0) + (0.15 if moves else 0))
        level = level + push * (100 / max(steps, 100)) * np.exp(-((level - 0.5) ** 2) / 10)
        mu = mu + 0.05 * (std.mean() / 4 - mu)
        tokens += int(rollouts_per_step * (40 + 10 * step / steps))
        seconds = {"plan": 0.004, "sample": 0.9, "verify": 0.05, "update": 0.7 + 0.02 * noise.random()}
        seconds["total"] = sum(seconds.values())
        ledger = {
            "rollouts": step * rollouts_per_step,
            "tokens": tokens,
            "scored": step * rollouts_per_step,
            "slot_steps": 2 * tokens,
            "seconds": ledger["seconds"] + seconds["total"],
        }
        record = {
            "step": step,
            "reward": float(np.average(rate, weights=n[bin_of]) + 0.02 * noise.normal()),
            "loss": 0.01 * noise.normal(),
            "kl": 0.0004 * step * (1 + 0.1 * noise.random()),
            "clip_fraction": 0.01 * noise.random(),
            "entropy": 0.9 - 0.4 * step / steps,
            "grad_norm": 0.3 + 0.1 * noise.random(),
            "response_length": 40 + 10 * step / steps,
            "all_equal_groups": float(np.mean(rate**4 + (1 - rate) ** 4)),
            "learning_rate": 1e-4,
            "logprob_gap": 1e-5 * noise.random(),
            "unscorable": 0.0,
            "useful_slot_steps": 0.8 + 0.1 * noise.random(),
            "train_padding": 0.1 + 0.1 * noise.random(),
            "clipped_length": 0.03 * noise.random(),
            "bins": {
                "share": share,
                "weight": np.where(present, w, np.nan),
                "rollouts": np.where(present, n, np.nan),
                "reward": np.where(present, middle, np.nan),
                "reward_std": np.where(present, std, np.nan),
            },
            "controller": ({"q": q, "effective_bins": effective} if weighs else {})
            | ({"price": mu, "forced_uniform": 0} if moves else {}),
            "strata": {"share": {}, "reward": {}, "rollouts": {}},
            "lead_lag": float((np.arange(bins) * (q - share)).sum()),
            "wse": wse,
            "wse_uniform": wse_uniform,
            "wse_reduction": 1 - wse / wse_uniform,
            "effective_bins": effective,  # of the weighted shares, which a rule without an adversary has too
            "ledger": dict(ledger),
            "seconds": seconds,
            "compiles": 3,
        }
        if eval_every and (step % eval_every == 0 or step == steps):
            record["eval"] = evaluated()
        records.append(record)
    return records


def simulate_run(
    folder: Path,
    method="prompt_gdro",
    seed=0,
    *,
    steps=12,
    bins=10,
    strata=("easy", "medium", "hard"),
    eval_every=4,
    rollouts_per_step=512,
) -> Path:
    names = list(reversed(strata))
    records = simulate(
        method, seed, steps=steps, bins=bins, strata=names, eval_every=eval_every, rollouts_per_step=rollouts_per_step
    )
    edges = [round((i + 1) / bins, 4) for i in range(bins - 1)]
    return write_records(
        folder,
        records,
        method,
        seed,
        model={"path": "embedded", "dtype": "float32"},
        data={"train": "procedural", "prompts": 1536},
        controller={"name": method, "difficulty": {"edges": edges, "statistic": "beta"}},
        train={"learning_rate": 1e-4, "prompts_per_step": 128},
    )


@pytest.fixture
def write_run(tmp_path: Path) -> MakeRun:
    """write_run(name, records, method, seed, **config sections) -> the folder of exactly these records."""
    return lambda name, records, *labels, **sections: write_records(tmp_path / name, records, *labels, **sections)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return lambda name="run", **kwargs: simulate_run(tmp_path / name, **kwargs)


@pytest.fixture
def make_comparison(tmp_path: Path) -> MakeComparison:
    def make(methods=("uniform", "prompt_gdro"), seeds=(0, 1), name="comparison", **kwargs) -> Path:
        return simulate_comparison(tmp_path / name, methods, seeds, **kwargs)

    return make


def simulate_comparison(folder: Path, methods: Sequence[str], seeds: Sequence[int], **kwargs) -> Path:
    runs = {f"{method}-seed{seed}": {"method": method, "seed": seed} for method in methods for seed in seeds}
    for name, label in runs.items():
        simulate_run(folder / name, **label, **kwargs)
    (folder / "compare.yaml").write_text(yaml.safe_dump({"methods": list(methods), "seeds": list(seeds), "runs": runs}))
    return folder
