"""The HTML of a report's tables and sentences, and its style sheet."""

from collections.abc import Mapping, Sequence
from html import escape

from gdro_jax.report.runs import Run
from gdro_jax.report.scores import MEASURES, base, by_method, curves, pass_label, stratum_names
from gdro_jax.report.statistics import Difference, mean_and_spread
from gdro_jax.report.style import BASELINE, cut, display_name, shortened
from gdro_jax.report.tables import Row, amount, difference, duration, score, strata_table, table

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5b6570;--line:#dfe3e7;--back:#fff;--card:#f6f7f9;
--up:#0a6b3d;--down:#a3330b;--link:#0b5cad}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b0;--line:#343b43;--back:#15191d;--card:#1e2429;
--up:#5fd39b;--down:#ff9b73;--link:#7db8f5}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main{max-width:1200px;margin:0 auto;padding:0 20px}header{padding-top:28px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 10px}h2{font-size:1.25rem;margin:44px 0 12px;padding-top:10px;
border-top:1px solid var(--line)}h3{font-size:1rem;margin:0 0 8px}
nav a{color:var(--link);text-decoration:none;margin-right:16px;font-size:.9rem;white-space:nowrap}
nav a:hover{text-decoration:underline}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.83rem;
font-variant-numeric:tabular-nums;margin:8px 0 14px}
th,td{padding:5px 8px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}th{font-weight:600;color:var(--soft);vertical-align:bottom}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:14em;max-width:26em}
table.text td,table.text th{text-align:left;white-space:normal}
.sub{display:block;font-size:.74rem;color:var(--soft)}.up{color:var(--up);font-weight:600}.down{color:var(--down);font-weight:600}
.warning{border:2px solid #c4320a;background:rgba(196,50,10,.09);border-radius:8px;padding:12px 18px;margin:20px 0 0}
.warning ul{margin:6px 0 0;padding-left:20px}.warning strong{color:var(--down)}
.note,figcaption{color:var(--soft);font-size:.88rem}p.note{max-width:105ch}
figure{margin:18px 0 26px;padding:16px;background:var(--card);border-radius:10px}
figure img{display:block;max-width:100%;height:auto;margin:0 auto;background:#fff;border-radius:6px}
figcaption{margin-top:10px;max-width:105ch}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
details{margin:6px 0}summary{cursor:pointer}
pre{background:var(--card);padding:12px;border-radius:8px;overflow-x:auto;font-size:.8rem}
"""


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """A table of cells that are already HTML where they hold markup made here, and are escaped where they are text."""
    kind = ' class="text"' if text else ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


class _Markup(str):
    """HTML made by this module, not to be escaped again."""


def findings(runs: Sequence[Run]) -> str:
    """One sentence per method: which of the four final scores differ from the baseline's by more than seeds explain."""
    rows = table(runs)
    labels = dict(zip(MEASURES, _measure_labels(runs), strict=True))
    items = []
    for row in rows:
        gaps = {measure: row[f"{measure}_difference"] for measure in MEASURES}
        found = {measure: gap for measure, gap in gaps.items() if isinstance(gap, Difference)}
        if row["method"] == BASELINE or not found:
            continue
        clear = [f"{labels[m]} {_colored(gap)}" for m, gap in found.items() if _tells(gap)]
        name = f"<strong>{escape(str(row['name']))}</strong>"
        pairs = max(gap.pairs for gap in found.values())
        if pairs < 2:
            items.append(
                f"{name}: one seed in common with the baseline, so no interval; read nothing into the differences."
            )
        elif clear:
            items.append(
                f"{name}: {', '.join(clear)}; no other score to tell from the baseline's."
                if len(clear) < 4
                else f"{name}: {', '.join(clear)}."
            )
        else:
            items.append(f"{name}: no final score that {pairs} paired seeds can tell from the baseline's.")
    refused = [str(row["name"]) for row in rows if not row["budget_matched"]]
    if refused:
        items.append(f"Refused, for the rollout budgets differ: {escape(', '.join(refused))}.")
    if items:
        intro = f"Final scores against {escape(display_name(BASELINE))} at equal rollouts, with 95 % paired intervals:"
        return f"<p>{intro}</p><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
    best = [f"{row['name']}: {labels['mean']} {score(row['mean'])}" for row in rows if row["mean"] is not None]
    return (
        f"<p>{escape('; '.join(best))}.</p>"
        if best
        else "<p>No evaluation was made; see the training reward below.</p>"
    )


def setup(runs: Sequence[Run]) -> str:
    """What was run: methods, seeds, steps, model, data, rollouts each."""
    groups = by_method(runs)
    first = runs[0]
    seeds = sorted({run.seed for run in runs})
    spent = {
        method: mean_and_spread([run.last("ledger", "rollouts") for run in its])[0] for method, its in groups.items()
    }
    problems = first.last("eval", "overall", "n")
    samples = first.last("eval", "samples")
    facts = {
        "Methods": ", ".join(f"{display_name(method)}" for method in groups),
        "Seeds": ", ".join(map(str, seeds)),
        "Steps": ", ".join(sorted({f"{run.num_steps:,}" for run in runs})),
        "Rollouts each": ", ".join(dict.fromkeys(amount(value) for value in spent.values())),
        "Model": _section(first, "model"),
        "Data": _section(first, "data"),
        "Evaluation": "none" if problems is None else f"{amount(problems)} problems, {amount(samples)} samples of each",
    }
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
        + "</dl>"
    )


def results(runs: Sequence[Run]) -> str:
    """The final table, with the base model's row first where it was evaluated."""
    rows = table(runs)
    short = shortened(stratum_names(runs), 34)
    head = ["method", *_measure_labels(runs), "rollouts", "tokens", "time"]
    cells: list[list[str]] = []
    bases = [curves(found) for run in runs if (found := base(run)) is not None]
    if bases:
        finals = [score(mean_and_spread([one.final(measure) for one in bases])[0]) for measure in MEASURES]
        cells.append(["base, before training", *finals, "0", "", ""])
    for row in rows:
        costs_of = [amount(row["rollouts"]), amount(row["tokens"]), duration(row["seconds"])]
        cells.append([_named(row, short), *(_score(row, measure) for measure in MEASURES), *costs_of])
    note = (
        "Mean over seeds ± standard deviation over seeds of the last evaluation. Below: difference from "
        f"{display_name(BASELINE)} and its 95 % Student t interval, paired over seeds; coloured where clear of 0, "
        "not corrected for the number of comparisons. Worst: the least stratum of each run, for each score by itself; "
        "the stratum named is the least by mean@1 averaged over seeds. Rollouts, tokens and time are of training."
    )
    return table_html(head, cells) + f'<p class="note">{escape(note)}</p>'


def strata(runs: Sequence[Run]) -> str:
    """Two tables, mean@1 and pass@k: a row for each stratum, hardest first, a column for each method."""
    rows = strata_table(runs)
    if not rows:
        return ""
    methods = list(by_method(runs))
    cells = {(row["stratum"], row["method"]): row for row in rows}
    bases = [curves(found) for run in runs if (found := base(run)) is not None]
    parts = []
    for part, title in (("mean", "mean@1"), ("pass", pass_label(runs))):
        head = [title, "problems", *(["base"] if bases else []), *(display_name(method) for method in methods)]
        body = []
        for name in dict.fromkeys(str(row["stratum"]) for row in rows):
            before = [score(mean_and_spread([one.final_stratum(name, part) for one in bases])[0])] if bases else []
            its = [_score(cells[name, method], part) for method in methods]
            body.append([name, amount(cells[name, methods[0]]["problems"]), *before, *its])
        parts.append(f"<h3>{escape(title)}</h3>{table_html(head, body)}")
    return "".join(parts)


def costs(runs: Sequence[Run]) -> str:
    """Mean seconds of a step by phase, and compilations."""
    phases = ("plan", "sample", "verify", "update", "total")
    rows = []
    for method, its in by_method(runs).items():
        cells = [display_name(method)]
        for phase in phases:
            values = [value for run in its for value in run.scalars("seconds", phase) if value == value]
            mean = mean_and_spread(values)[0]
            cells.append("-" if mean is None else f"{mean:.3g} s")
        compiled = mean_and_spread([run.last("compiles") for run in its])[0]
        cells.append("-" if compiled is None else f"{compiled:.3g}")
        rows.append(cells)
    if all(cell == "-" for cells in rows for cell in cells[1:]):
        return ""
    return table_html(["mean seconds of a step", *phases, "compilations"], rows)


def _cell(text: str) -> str:
    return text if isinstance(text, _Markup) else escape(text)


def _named(row: Row, short: Mapping[str, str]) -> _Markup:
    seeds, worst = row["seeds"], row["worst_stratum"]
    count = len(seeds) if isinstance(seeds, list) else 0
    below = f"{count} seed{'s' * (count != 1)}" + ("" if worst is None else f"; worst: {cut(short[str(worst)], 34)}")
    return _Markup(f'{escape(str(row["name"]))}<span class="sub">{escape(below)}</span>')


def _score(row: Row, measure: str) -> _Markup:
    gap = row[f"{measure}_difference"]
    below = f'<span class="sub">{_colored(gap)}</span>' if isinstance(gap, Difference) else ""
    return _Markup(escape(score(row[measure], row[f"{measure}_spread"])) + below)


def _tells(gap: Difference) -> bool:
    """Clear of zero, and not only in digits that are not shown."""
    return (
        gap.clear_of_zero and gap.low is not None and gap.high is not None and min(abs(gap.low), abs(gap.high)) >= 5e-4
    )


def _colored(gap: Difference) -> str:
    text = escape(difference(gap))
    return f'<span class="{"up" if gap.mean > 0 else "down"}">{text}</span>' if _tells(gap) else text


def _measure_labels(runs: Sequence[Run]) -> list[str]:
    passes = pass_label(runs)
    return ["mean@1", passes, "worst mean@1", f"worst {passes}"]


def _section(run: Run, name: str) -> str:
    """The plain values of a section of the config in one line."""
    section = run.setting(name)
    if not isinstance(section, Mapping):
        return "" if section is None else str(section)
    plain = [f"{key} {value}" for key, value in section.items() if isinstance(value, (str, int, float)) and value != ""]
    return ", ".join(plain)
