"""The tables and the plot of the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADINGS = {
    "checked": "| run | step, ms: predicted, measured | off by | of it communication | "
    "weights and states, MB: predicted, measured |",
    "predicted": "| model | devices | strategy | micro-batch | memory, GB | step, ms | exposed, host, ms | sent, GB | "
    "MFU | examples of a device, to wait for 10%, 50% of a step |",
    "fits": "| model | parameters | strategy | memory of one example, GB, on 8, 64, 1,024 devices | least devices |",
}


def format_table(kind: str, lines: Sequence[str]) -> str:
    """Return a table in Markdown."""
    heading = HEADINGS[kind]
    return "\n".join([heading, "|" + "---|" * (heading.count("|") - 1), *lines])


def format_checked(rows: Sequence[Row]) -> str:
    """Return the table of predicted and measured steps."""
    lines = []
    for row in rows:
        predicted, measured = 1000 * row["predicted_seconds"], 1000 * row["measured_seconds"]
        times = f"{predicted:,.0f}, {measured:,.0f}"
        off = "input" if row["is_input"] else f"{predicted / measured - 1:+.0%}"
        memory = f"{row['predicted_states'] / 1e6:,.1f}, {row['measured_states'] / 1e6:,.1f}"
        share = row["communication_seconds"] / row["predicted_seconds"]
        lines.append(f"| {row['run']} | {times} | {off} | {share:.0%} | {memory} |")
    return format_table("checked", lines)


def format_predicted(rows: Sequence[Row]) -> str:
    """Return the table of the fastest plan of each model and number of devices."""
    lines = []
    for row in rows:
        name = f"| {row['model']} | {row['world_size']:,} |"
        if row["strategy"] is None:
            lines.append(f"{name} none fits | | | | | | | |")
            continue
        plan = f"{row['strategy']}{', checkpointing' if row['checkpointing'] else ''} | {row['micro_batch']}"
        waits = f"{1000 * row['exposed']:.1f}, {1000 * row['host']:.1f}"
        least = ", ".join(f"{count:,}" if count else "never" for count in row["least_examples"])
        lines.append(
            f"{name} {plan} | {row['memory'] / 1e9:.0f} | {1000 * row['seconds']:,.0f} | {waits} | "
            f"{row['sent'] / 1e9:.1f} | {row['mfu']:.0%} | {least} |"
        )
    return format_table("predicted", lines)


def format_memory(rows: Sequence[Row]) -> str:
    """Return the table of what fits: the memory of one example with activation checkpointing."""
    lines = []
    for row in rows:
        sizes = ", ".join(f"{size / 1e9:,.1f}" for size in row["memory"])
        least = f"{row['least']:,}" if row["least"] else "none fits"
        lines.append(f"| {row['model']} | {row['parameters'] / 1e6:,.0f} M | {row['strategy']} | {sizes} | {least} |")
    return format_table("fits", lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot MFU and the share of waiting of each model's strategies against the number of devices, to .png or .svg.

    Raises SystemExit if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(2.9 * len(models), 5.4), layout="constrained")
    axes = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False)
    for column, model in enumerate(models):
        for strategy, color in COLORS.items():
            points = [row for row in rows if row["model"] == model and row["strategy"] == strategy]
            devices = [row["world_size"] for row in points]
            waits = [(row["exposed"] + row["host"]) / row["seconds"] for row in points]
            for line, values in zip(axes[:, column], ([row["mfu"] for row in points], waits), strict=True):
                line.plot(devices, [100 * value for value in values], marker="o", color=color, label=strategy)
        axes[0, column].set_title(model)
        axes[1, column].set_xlabel("devices")
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xticks([8, 64, 512], ["8", "64", "512"])
    axes[0, 0].set_ylabel("MFU, %")
    axes[1, 0].set_ylabel("waiting, % of a step")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, -1].legend()
    figure.savefig(path)


COLORS: Mapping[str, str] = {"ddp": "tab:blue", "fsdp": "tab:orange", "hsdp": "tab:green"}
