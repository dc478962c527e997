"""One self-contained report.html: tables, inlined figures, what they show, and what was run."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from os import PathLike
from pathlib import Path

import yaml

from gdro_jax.report.checks import check
from gdro_jax.report.comparison import read_comparison
from gdro_jax.report.figures import Plot, draw_all
from gdro_jax.report.html import STYLE, costs, findings, results, setup, strata, table_html
from gdro_jax.report.runs import PathType, Run, RunError
from gdro_jax.report.scores import by_method
from gdro_jax.report.style import cut, display_name

_SECTIONS = (
    ("learning", "Learning"),
    ("curriculum", "The emergent curriculum"),
    ("diagnostics", "Diagnostics of the controllers"),
    ("health", "Training health"),
)


def write(folders: PathType | Sequence[PathType], out: PathType | None = None) -> Path:
    """Write OUT/report.html and OUT/figures/*.png for a run folder, a compare folder, or several run folders.

    `out` is by default the folder itself; for several, the folder that holds them all. The page needs no other file
    and no network. Returns its path. Raises RunError where a folder cannot be read or written, or where several
    folders have no common parent and `out` is not given.
    """
    paths = [folders] if isinstance(folders, (str, PathLike)) else list(folders)
    runs = read_comparison(paths)
    target = Path(out) if out is not None else _default_out([Path(path) for path in paths])
    try:
        (target / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{target / 'figures'}: not a folder that can be written ({error.strerror})") from None
    plots = draw_all(runs)
    images: dict[str, bytes] = {}
    for plot in plots:
        path = target / "figures" / f"{plot.name}.png"
        path.unlink(missing_ok=True)  # one of an earlier report that this one no longer has
        if plot.figure is not None:
            buffer = BytesIO()
            plot.figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
            images[plot.name] = buffer.getvalue()
            path.write_bytes(images[plot.name])
    page = target / "report.html"
    page.write_text(render(runs, plots, images), encoding="utf-8")
    return page


def render(runs: Sequence[Run], plots: Sequence[Plot], images: dict[str, bytes]) -> str:
    """The page's text. `images` holds the PNG of each plot that has a figure."""
    title = _title(runs)
    warned = "".join(f"<li>{escape(text)}</li>" for text in check(runs))
    sections = [
        ("summary", "In short", findings(runs)),
        ("setup", "What was run", setup(runs)),
        ("results", "Final results", results(runs) + _figures("results", plots, images)),
    ]
    if by_strata := strata(runs):
        sections.append(("strata", "Results by stratum", by_strata))
    for key, name in _SECTIONS:
        if body := _figures(key, plots, images):
            sections.append((key, name, body))
    sections += [("costs", "Where the time went", costs(runs)), ("configs", "Configurations", _configs(runs))]
    links = " ".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, body in sections if body)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>{text}</section>' for key, name, text in sections if text
    )
    warning = (
        f'<div class="warning" role="alert"><strong>Before you compare</strong><ul>{warned}</ul></div>'
        if warned
        else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><nav>{links}</nav></header>\n<main>{warning}{body}</main></body></html>\n"
    )


def _title(runs: Sequence[Run]) -> str:
    names = [display_name(method) for method in by_method(runs)]
    if len(runs) == 1:
        return f"Run report: {names[0]}, seed {runs[0].seed}"
    if len(names) > 4:
        return f"Comparison of {len(names)} methods"
    return f"Comparison: {', '.join(names)}" if len(names) > 1 else f"{names[0]}, {len(runs)} seeds"


def _figures(section: str, plots: Sequence[Plot], images: dict[str, bytes]) -> str:
    parts, absent = [], []
    for plot in plots:
        if plot.section != section:
            continue
        if plot.name not in images:
            absent.append(f"{plot.title} ({plot.absent})")
            continue
        data = base64.b64encode(images[plot.name]).decode("ascii")
        parts.append(
            f'<figure id="figure-{plot.name}"><h3>{escape(plot.title)}</h3>'
            f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        )
    note = f'<p class="note">Not shown: {escape("; ".join(absent))}.</p>' if absent else ""
    return "".join(parts) + note


def _configs(runs: Sequence[Run]) -> str:
    """The configuration of one run of each method, folded."""
    parts = []
    for method, its in by_method(runs).items():
        text = yaml.safe_dump(dict(its[0].config), sort_keys=False, allow_unicode=True)
        parts.append(
            f"<details><summary>{escape(display_name(method))}, seed {its[0].seed} "
            f"({escape(cut(its[0].folder.name))})</summary><pre>{escape(text)}</pre></details>"
        )
    folders = table_html(
        ["run", "method", "seed", "steps"],
        [[run.folder.name, display_name(run.method), str(run.seed), str(run.num_steps)] for run in runs],
    )
    return "".join(parts) + f"<details><summary>All {len(runs)} runs</summary>{folders}</details>"


def _default_out(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    parents = {folder.resolve().parent for folder in folders}
    if len(parents) > 1:
        raise RunError("the run folders have no common parent: say where to write the report (out)")
    return parents.pop()
