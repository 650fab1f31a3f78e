"""The tables of a record of gpu_check: Markdown with aligned columns, readable in a terminal too.

python -m benchmarks.gpu_check.table FILE.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.gpu_check.check import Row


class Column(NamedTuple):
    """A column: its heading, the figure it shows, and the format of the figure."""

    heading: str
    figure: str
    form: str = ""


OK, WHERE = Column("ok", "ok"), Column("where", "where")
ERRORS = (Column("loss error", "loss_error", ".1e"), Column("gradient error", "gradient_error", ".1e"))
RATES = (Column("examples/s", "samples_per_second", ",.1f"), Column("tokens/s", "tokens_per_second", ",.0f"))
MEMORY = Column("peak MB", "peak_memory_mb", ",.0f")
COLUMNS: dict[str, tuple[Column, ...]] = {
    "machine": (
        Column("TFLOP/s, GB/s, GiB", "value", ",.2f"),
        Column("of datasheet", "share_of_datasheet", ".0%"),
        Column("", "text"),
    ),
    "correctness": (OK, *ERRORS, WHERE),
    "waits": (OK, WHERE),
    "training_speed": (
        *RATES,
        Column("of plain", "of_plain", ".2f"),
        Column("MFU of part 1", "mfu_of_product", ".0%"),
        Column("of its shapes", "mfu", ".0%"),
        Column("of datasheet", "mfu_datasheet", ".0%"),
        MEMORY,
        Column("kernels", "launches", ",.0f"),
        Column("waits", "waits", ".1f"),
        Column("step ms p50", "step_ms_p50", ".1f"),
        Column("p99", "step_ms_p99", ".1f"),
        Column("for data", "waiting", ".1%"),
    ),
    "other_trainers": (
        *RATES,
        MEMORY,
        Column("ours is as fast", "times_as_fast", ".2f"),
        Column("of its memory", "of_its_memory", ".2f"),
        OK,
        *ERRORS,
    ),
    "recovery": (OK, ERRORS[0], WHERE),
    "inference": (*RATES, OK, Column("difference", "loss_error", ".1e")),
}


def format_tables(content: dict[str, Any]) -> str:
    """Return a table for each part of a record, with its notes below it."""
    rows = with_ratios(content["results"])
    machine = content["machine"]
    name = ", ".join(machine["gpus"]) or machine["cpu"]
    lines = [f"{content['date']}, commit {content['commit'][:7]}, {name}, torch {content['versions'].get('torch', '')}"]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        notes = [row for row in own if row.get("note")]
        measured = [row for row in own if row["runs"] and row["work"] != "the whole part"]
        seconds = sum(figures.get("seconds", 0.0) for row in own for figures in row["runs"] if "seconds" in figures)
        lines += ["", f"### {part} ({seconds:.0f} s)", ""]
        lines += format_rows(summarize_passed(measured) if part in ("correctness", "waits") else measured, part)
        lines += [f"- {row['work']}: {row['note']}" for row in notes]
    return "\n".join(lines)


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows with the MFU of the product rate of part 1, and with ratios.

    Those of part 4 are to the workload in the same precision alone, those of other trainers to ours.
    """
    products = {row["variant"]: row["runs"][0]["value"] * 1e12 for row in rows if row["work"] == "product"}
    ours = {
        (row["work"], row["variant"]): row["runs"][0] for row in rows if row["part"] == "training_speed" and row["runs"]
    }
    found = []
    for row in rows:
        figures = dict(row["runs"][0]) if row["runs"] else {}
        precision = row["variant"].split(" ")[0]
        if "flops_per_second" in figures and precision in products:
            figures["mfu_of_product"] = figures["flops_per_second"] / products[precision]
        plain = ours.get((row["work"], precision))
        if row["part"] == "training_speed" and plain and row["variant"] != precision:
            figures["of_plain"] = figures["samples_per_second"] / plain["samples_per_second"]
        variant = " ".join(row["variant"].split(" ")[1:])  # without the peer
        mine = ours.get((row["work"], variant))
        if row["part"] == "other_trainers" and "samples_per_second" in figures and mine:
            # Both read other examples, so texts are compared by tokens.
            name = "tokens_per_second" if "tokens_per_second" in figures else "samples_per_second"
            figures["times_as_fast"] = mine[name] / figures[name]
            figures["of_its_memory"] = mine["peak_memory_mb"] / figures["peak_memory_mb"]
        found.append({**row, "runs": [figures] if figures else []})
    return found


def summarize_passed(rows: list[Row]) -> list[Row]:
    """Return all rows that failed, and a row for each precision on those that passed."""
    passed: dict[str, list[Row]] = {}
    for row in rows:
        if row["runs"][0]["ok"]:
            passed.setdefault(row["variant"], []).append(row)
    summary = []
    for variant, good in passed.items():
        errors = {
            name: max(row["runs"][0][name] for row in good if name in row["runs"][0])
            for name in ("loss_error", "gradient_error")
            if any(name in row["runs"][0] for row in good)
        }
        summary.append({"work": f"{len(good)} cases", "variant": variant, "runs": [{"ok": True, **errors}]})
    return summary + [row for row in rows if not row["runs"][0]["ok"]]


def format_rows(rows: Sequence[Row], part: str) -> list[str]:
    """Return a Markdown table with the columns that have a value in any row."""
    columns = [c for c in COLUMNS[part] if any(row["runs"][0].get(c.figure) not in (None, "") for row in rows)]
    if not rows:
        return []
    cells = [["work", "variant", *(column.heading for column in columns)]]
    for row in rows:
        cells.append([row["work"], row["variant"], *(format_cell(row["runs"][0], column) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align: Callable[[list[str]], str] = lambda texts: (  # noqa: E731
        "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)) + " |"
    )
    return [align(cells[0]), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(align, cells[1:])]


def format_cell(figures: dict[str, Any], column: Column) -> str:
    """Return one figure as text; "" where there is none."""
    value = figures.get(column.figure)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return format(value, column.form) if column.form else str(value).replace("|", "/")


def failures(rows: list[Row]) -> list[str]:
    """Return a line for each row that is not as it should be."""
    wrong = [row for row in rows if any(figures.get("ok") is False for figures in row["runs"])]
    return [
        f"NOT OK: {row['part']}: {row['work']} {row['variant']} {row['runs'][0].get('where', '')} {row.get('note', '')}"
        for row in wrong
    ]


if __name__ == "__main__":
    print(format_tables(record.read(Path(sys.argv[1]))))
