"""What a run said before its first step, which it keeps as summary.txt: the model, the data, the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.run_folder import RESUMED, SUMMARY

MODEL, DATA, STEPS = "Model loading", "Data", "Steps"
BEGINS = {"weights:": MODEL, "parameters:": STEPS}  # of a paragraph; all others are about the data


def read_summary(folder: Path) -> Mapping[str, str]:
    """Return {MODEL, DATA or STEPS: its paragraphs} as a run began; {} for a run that kept no summary."""
    try:
        text = (folder / SUMMARY).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    first = text.partition(RESUMED)[0]
    for paragraph in filter(None, (part.strip("\n") for part in first.split("\n\n"))):
        title = next((name for start, name in BEGINS.items() if paragraph.startswith(start)), DATA)
        found.setdefault(title, []).append(paragraph)
    return {title: "\n\n".join(own) for title, own in found.items()}
