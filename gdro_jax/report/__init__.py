"""Figures, tables and one self-contained page from run folders; nothing else of the package is needed."""

from gdro_jax.report.checks import check
from gdro_jax.report.comparison import read_comparison
from gdro_jax.report.page import write
from gdro_jax.report.runs import EmptyRunError, Run, RunError, read_run
from gdro_jax.report.statistics import Difference
from gdro_jax.report.tables import format_table, strata_table, table

__all__ = [
    "Difference",
    "EmptyRunError",
    "Run",
    "RunError",
    "check",
    "format_table",
    "read_comparison",
    "read_run",
    "strata_table",
    "table",
    "write",
]
