"""Pairs of a text and what to write for it, from rows or from two files side by side, and their encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.errors import DataError, ErrorList
from data.examples import TextExamples, count_notes
from data.formats import rows as readers
from data.formats.rows import Row, locate, read_rows
from data.text_classification import check_rows, encode_texts


@dataclass(frozen=True)
class PairTokenizer:
    """A tokenizer, and what no file of a tokenizer says: the token that the model's decoder reads first."""

    tokenizer: Tokenizer
    decoder_start_id: int

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def id_to_token(self, number: int) -> str | None:
        return self.tokenizer.id_to_token(number)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


@dataclass(frozen=True)
class Seq2SeqRecord:
    """The texts of N pairs, and what they are decoded and scored with."""

    tokenizer: Tokenizer
    sources: list[str]  # (N,) without the prefix
    references: list[str]  # (N,) the targets as text; [] without targets
    bleu_tokenizer: str  # sacrebleu's name of the tokenizer that BLEU uses; "": BLEU is not computed


def read_pairs(
    name: str, source: str, target: str, *, id_column: str = "id", format: str = "auto", more: Sequence[str] = ()
) -> list[Row]:
    """Rows with the columns `source` and `target` ("": there is none, to predict), both of them text and not empty.

    format: parallel reads NAME.source and NAME.target, whose lines belong together; any other is of rows (read_rows),
    where the columns in `more` are needed too. DataError with all that is bad.
    """
    columns = [source, *([target] if target else [])]
    if format == "parallel":
        return _read_parallel(name, columns)
    errors = ErrorList()
    rows = read_rows(name, [*columns, *more], id_column, errors, format)
    check_rows(name, rows, columns, "", errors)
    errors.raise_if_any()
    return rows


def _read_parallel(name: str, suffixes: Sequence[str]) -> list[Row]:
    """Rows of the lines of NAME.suffix for each suffix, which are the columns; ids are the line numbers."""
    errors = ErrorList()
    texts: dict[str, list[str]] = {}
    for suffix in suffixes:
        path = Path(f"{locate(name)}.{suffix}")
        try:
            texts[suffix] = [text for _, text in readers.clean_lines(path, errors)]
        except FileNotFoundError:
            read = " and ".join(f"{name}.{suffix}" for suffix in suffixes)
            raise DataError(f"{path}: no such file; data.format = 'parallel' reads {read}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    errors.raise_if_any()  # first, since a line that could not be read is not counted
    counts = {f"{name}.{suffix}": len(lines) for suffix, lines in texts.items()}
    if len(set(counts.values())) > 1:
        have = " and ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise DataError(f"{have} lines: line n of one belongs to line n of the other, so they must be equal")
    rows = [
        Row(str(i), i, dict(zip(suffixes, pair, strict=True)))
        for i, pair in enumerate(zip(*texts.values(), strict=True), start=1)
    ]
    if not rows:
        raise DataError(f"{name}.{suffixes[0]}: no lines")
    for suffix in suffixes:
        check_rows(f"{name}.{suffix}", rows, [suffix], "", errors)
    errors.raise_if_any()
    return rows


def encode_pairs(
    rows: Sequence[Row],
    processor: PairTokenizer,
    *,
    source: str = "source",
    target: str = "",
    prefix: str = "",
    max_length: int,
    max_target_length: int = 128,
    bleu_tokenizer: str = "",
) -> TextExamples[Seq2SeqRecord]:
    """Encode prefix + source, truncated to `max_length` tokens, and the target, truncated to `max_target_length`.

    Both lengths include the special tokens: a truncated text still ends with the end token.
    target: a column, or "" for rows without. bleu_tokenizer: see Seq2SeqRecord.
    `truncated` counts the sources; `notes` name the targets too.
    """
    prefixed = [Row(row.id, row.line, {source: prefix + row.values[source]}) for row in rows]
    examples = encode_texts(prefixed, processor.tokenizer, text=source, max_length=max_length)
    record = Seq2SeqRecord(
        tokenizer=processor.tokenizer,
        sources=[row.values[source] for row in rows],
        references=[row.values[target] for row in rows] if target else [],
        bleu_tokenizer=bleu_tokenizer,
    )
    if not target:
        return examples.with_record(record)
    targets = encode_texts(rows, processor.tokenizer, text=target, max_length=max_target_length)
    return examples.with_record(
        record,
        target_ids=targets.input_ids,
        target_offsets=targets.offsets,
        decoder_start_id=processor.decoder_start_id,
        notes=count_notes(
            (examples.truncated, "text", "truncated to data.max_length"),
            (targets.truncated, "target", "truncated to seq2seq.max_target_length"),
        ),
    )
