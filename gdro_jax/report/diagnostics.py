"""Figures of the controllers' diagnostics and of the training's health."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gdro_jax.report.learning import Groups, line, line_panels, method_handles
from gdro_jax.report.series import Series, per_step
from gdro_jax.report.style import FAINT, dress, legend, looks, new_figure

_DOTS = (0, (3, 2))


def lead_lag(groups: Groups) -> Figure | None:
    """Weighted mean bin minus share mean bin."""
    figure = line_panels(
        groups, [("lead_lag", "", "Δ (bins; below 0 leans to the hard)")], width=9, height=3.8, columns=1
    )
    if figure is not None:
        figure.axes[0].axhline(0, color=FAINT, linewidth=1, zorder=1)
    return figure


def effective_bins(groups: Groups) -> Figure | None:
    """exp of the entropy of the adversary's distribution."""
    figure = line_panels(
        groups, [("controller.effective_bins", "", "effective bins (count)")], width=9, height=3.8, columns=1
    )
    if figure is not None:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def price(groups: Groups) -> Figure | None:
    """The dual variable of the rollout budget, of the methods that have one."""
    panels = [("controller.price", "", "price μ (utility per rollout)")]
    return line_panels(groups, panels, width=9, height=3.8, columns=1)


def standard_error(groups: Groups) -> Figure | None:
    """The weighted standard error with its uniform counterpart, and the reduction in per cent."""
    actual = {method: per_step(runs, "wse") for method, runs in groups.items()}
    if all(series.empty for series in actual.values()):
        return None
    figure = new_figure(10, 3.9)
    styles = looks(list(groups))
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for method, runs in groups.items():
        line(left, actual[method], styles[method])
        uniform = per_step(runs, "wse_uniform")
        line(left, Series(x=uniform.x, mean=uniform.mean, spread=uniform.spread * np.nan), styles[method], dash=_DOTS)
        cut = per_step(runs, "wse_reduction")
        line(right, Series(x=cut.x, mean=100 * cut.mean, spread=100 * cut.spread), styles[method])
    right.axhline(0, color=FAINT, linewidth=1, zorder=1)
    dress(left, title="weighted standard error", y="WSE (reward units)")
    dress(right, title="reduction against uniform", y="1 - WSE / uniform WSE (%)")
    note = Line2D([], [], color=FAINT, linestyle=_DOTS, linewidth=1.7, label="dashed: with uniform rollouts")
    legend(figure, [*method_handles(groups), note])
    return figure


def health(groups: Groups) -> Figure | None:
    """What a person looks at to see that the training itself is sound."""
    panels = (
        ("loss", "loss", "loss"),
        ("kl", "KL to the reference", "KL (nats)"),
        ("entropy", "entropy", "entropy (nats per token)"),
        ("clip_fraction", "clipped ratios", "share of tokens"),
        ("grad_norm", "gradient norm", "global L2 norm"),
        ("learning_rate", "learning rate", "learning rate"),
        ("response_length", "response length", "tokens per response"),
        ("clipped_length", "cut at the token limit", "share of rows"),
        ("unscorable", "unscorable responses", "share of rows"),
        ("logprob_gap", "sampler / trainer gap", "largest |Δ log-prob| (nats)"),
        ("useful_slot_steps", "useful slot-steps of sampling", "share"),
        ("train_padding", "padding of the update", "share of its work"),
        ("seconds.verify", "waiting for the verifier", "seconds"),
        ("seconds.total", "time of a step", "seconds"),
        ("compiles", "XLA compilations", "count so far"),
    )
    return line_panels(groups, panels, width=10.5, height=2.3, columns=3)
