"""The limit of a micro-batch that a run which ran out of memory leaves behind for its next attempt."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data import MicroBatching
from data.writing import to_json, write_text
from engine.config import TrainSettings
from engine.distributed import Ranks, on_main

FILE = "out_of_memory.json"


@dataclass(frozen=True)
class KeptLimit:
    """The file out_of_memory.json of a run folder.

    It is written where the run cannot repeat a step in smaller micro-batches by itself, since the other ranks wait in a
    collective of their own. It counts only as long as the limits of [train] are those that were too large.
    """

    folder: Path
    settings: TrainSettings

    def keep(self, tokens: int) -> int:
        """Write the limit of the next attempt, in tokens; return it."""
        with suppress(OSError):  # the error that the run ends with matters more
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / FILE, [to_json({"too_large": self._limits(), "max_tokens": tokens}), "\n"])
        return tokens

    def apply(self, limits: MicroBatching, ranks: Ranks) -> MicroBatching:
        """Return the limits with that of an earlier attempt, where it is smaller; the same on all ranks."""
        tokens = on_main(ranks, self._read)
        if not tokens or (limits.max_tokens and limits.max_tokens <= tokens):
            return limits
        return replace(limits, max_examples=0, max_tokens=tokens)

    def describe(self, limits: MicroBatching) -> list[str]:
        """Return a note where the limits are those of an earlier attempt."""
        if limits.max_tokens == self.settings.micro_batch_tokens or limits.max_tokens != self._read():
            return []
        return [
            f"{self.folder / FILE}: an earlier attempt ran out of memory, so a micro-batch has at most "
            f"{limits.max_tokens:,} tokens; another train.micro_batch_size or train.micro_batch_tokens replaces this"
        ]

    def _limits(self) -> list[int | str]:
        return [self.settings.micro_batch_size, self.settings.micro_batch_tokens]

    def _read(self) -> int:
        """Return the limit of an earlier attempt, 0 for none."""
        try:
            found = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            tokens = found["max_tokens"] if found["too_large"] == self._limits() else 0
            return tokens if type(tokens) is int and tokens > 0 else 0
        except (OSError, ValueError, LookupError, TypeError):
            return 0
