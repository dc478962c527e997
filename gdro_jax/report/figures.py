"""The list of a report's figures: each a drawn matplotlib figure with its caption, or the reason why it is absent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from gdro_jax.report import curriculum, diagnostics, learning
from gdro_jax.report.runs import Run
from gdro_jax.report.scores import by_method, pass_label

Draw = Callable[[Mapping[str, Sequence[Run]]], Figure | None]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure of the report. `figure` is None where no run has what it shows; `absent` then says so."""

    name: str
    section: str
    title: str
    caption: str
    absent: str
    figure: Figure | None


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    section: str
    title: str
    caption: str
    absent: str
    draw: Draw


def draw_all(runs: Sequence[Run]) -> list[Plot]:
    """Every figure of the report, in its order."""
    groups = by_method(runs)
    passes, part = pass_label(runs), _of_part(runs)
    return [
        Plot(
            name=entry.name,
            section=entry.section,
            title=entry.title.replace("pass@k", passes),
            caption=entry.caption.replace("pass@k", passes) + (part if entry.name in _HELD_OUT_CURVES else ""),
            absent=entry.absent,
            figure=entry.draw(groups),
        )
        for entry in _ENTRIES
    ]


def _of_part(runs: Sequence[Run]) -> str:
    """What a caption adds where evaluations along the way are of fewer problems than the first and the last."""
    if not any("eval_part" in record for run in runs for record in run.records):
        return ""
    numbers = {run.setting("eval", "problems_per_stratum") for run in runs}
    first = f"the first {numbers.pop()} problems" if len(numbers) == 1 else "the first problems"
    return f" Curves are of {first} of each stratum throughout; the tables' scores are of all."


_HELD_OUT_CURVES = ("learning", "strata_mean", "strata_pass")
_NO_EVALUATION = "no run was evaluated as it trained"
_ENTRIES = (
    _Entry(
        name="differences",
        section="results",
        title="Difference from GRPO, paired over seeds",
        caption="Look for intervals that lie clear of 0: dots are mean differences of final scores over seeds, "
        "bars their 95 % Student t intervals. They are not corrected for the number of rows.",
        absent="it needs the baseline and another method at equal budgets, with two seeds or more in common",
        draw=learning.differences,
    ),
    _Entry(
        name="learning",
        section="learning",
        title="Held-out mean@1 and pass@k",
        caption="Look for curves that rise sooner at equal rollouts (left), above all on the worst stratum "
        "(bottom), and for pass@k falling while mean@1 rises (sharpening). The worst stratum is the least score "
        "at each evaluation (arXiv 2601.19280's mean@k and pass@k); bands are one standard deviation over seeds.",
        absent=_NO_EVALUATION,
        draw=learning.overall,
    ),
    _Entry(
        name="strata_mean",
        section="learning",
        title="Held-out mean@1 of each stratum",
        caption="Look for the strata where the methods part: strata run from the hardest to the easiest by the "
        "base's mean@1, and each panel has a scale of its own.",
        absent=_NO_EVALUATION + " by stratum",
        draw=learning.strata_mean,
    ),
    _Entry(
        name="strata_pass",
        section="learning",
        title="Held-out pass@k of each stratum",
        caption="Look for hard strata whose pass@k falls below where it began: there training sharpens what the "
        "base could already do instead of widening it.",
        absent=_NO_EVALUATION + " by stratum",
        draw=learning.strata_pass,
    ),
    _Entry(
        name="reward",
        section="learning",
        title="Training reward",
        caption="Look at the slope only, not the level: a method that gives hard prompts more rollouts draws a "
        "harder batch of rows. Right: groups whose rewards are all alike have zero advantage (Eq. 3) and teach "
        "nothing.",
        absent="no run logged a reward",
        draw=learning.reward,
    ),
    _Entry(
        name="shares",
        section="curriculum",
        title="Difficulty shares",
        caption="Look for the dark (hard) band at the top thinning as prompts move down into easier bins: share "
        "of the step's prompts in each bin of the online classifier (Eq. 10).",
        absent="no run logged shares",
        draw=curriculum.shares,
    ),
    _Entry(
        name="weights",
        section="curriculum",
        title="Weight of each bin",
        caption="Look for red rising towards the bins that the policy still fails, and moving as they are "
        "learned: weight of a bin's prompts (Eq. 14 to 16) relative to the mean weight of the step, so 1 is "
        "GRPO. Grey: no prompt.",
        absent="no run logged weights",
        draw=curriculum.weights,
    ),
    _Entry(
        name="rollouts",
        section="curriculum",
        title="Rollouts of each bin",
        caption="Look for red where rollouts are moved to, at the expense of blue: mean rollouts per prompt, "
        "chosen under an exact total (Eq. 20 and 21), so white is the uniform count. Grey: no prompt.",
        absent="no run logged rollouts",
        draw=curriculum.rollouts,
    ),
    _Entry(
        name="lead_lag",
        section="diagnostics",
        title="Lead-lag",
        caption="Look for values below 0: there the weights lean towards harder bins than the prompts' own, "
        "Δ(t) = Σ b·ŵ_b - Σ b·q̂_b (arXiv 2601.19280), and a return to 0 as the curriculum catches up.",
        absent="no run logged it",
        draw=diagnostics.lead_lag,
    ),
    _Entry(
        name="standard_error",
        section="diagnostics",
        title="Weighted standard error",
        caption="Look for solid lines under their dashed ones: WSE(t) = Σ q̂_b s_b/√n_b as allocated, against "
        "n_bar rollouts for each prompt (arXiv 2601.19280). Right: how much the allocation takes off it.",
        absent="no run logged it",
        draw=diagnostics.standard_error,
    ),
    _Entry(
        name="effective_bins",
        section="diagnostics",
        title="Effective number of bins",
        caption="Look for a collapse towards 1, where the adversary has put all its mass on one bin; exp(H(q)) "
        "of its distribution q (Eq. 15), at most the number of bins.",
        absent="no run has an adversary's distribution",
        draw=diagnostics.effective_bins,
    ),
    _Entry(
        name="price",
        section="diagnostics",
        title="Price of a rollout, μ",
        caption="Look for where it settles: the shadow price of one more rollout (Eq. 21). A flat 0 is right "
        "under the exact dual, where the budget is met at every step and the printed update never moves.",
        absent="no method here has a price",
        draw=diagnostics.price,
    ),
    _Entry(
        name="health",
        section="health",
        title="Training health",
        caption="Look for anything that jumps, or that differs between methods though it should not: policy "
        "loss and KL (Eq. 5 and 6), clipping, entropy, gradients, lengths, and the largest gap of sampler and "
        "trainer log-probs.",
        absent="nothing was logged",
        draw=diagnostics.health,
    ),
)
