"""Pairs of a source text and the target text to write for it: rows, and examples for an encoder-decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenizers import Encoding, Tokenizer

from data.errors import DataError, ErrorList
from data.examples import TextExamples, warn_of_part
from data.formats.lines import NOT_READ, locate, suffix_of
from data.formats.memory import is_in_memory
from data.formats.options import FileOptions
from data.formats.rows import READERS, read_rows
from data.formats.text import read_parallel
from data.row import Row, Rows
from data.text_classification import check_texts, encode_texts

# The columns of sources and targets in public data sets, for a message about a file without the ones it should have.
KNOWN_PAIRS = (
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "abstract"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("content", "title"),
    ("text", "headline"),
    ("text", "target"),
    ("src", "tgt"),
    ("source", "target"),
    ("input", "output"),
)
LANGUAGE = re.compile(r"(.*\.)?[a-z]{2,3}([_-][A-Za-z]{2,4})?")  # a column named by a language, as en or translation.de


@dataclass(frozen=True)
class PairTokenizer:
    """A tokenizer, and the token that the decoder reads first, which the files of a tokenizer do not contain."""

    tokenizer: Tokenizer
    decoder_start_id: int

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def id_to_token(self, number: int) -> str | None:
        return self.tokenizer.id_to_token(number)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


@dataclass(frozen=True)
class Seq2SeqRecord:
    """The texts of N pairs, and the tokenizers to decode and score generated texts."""

    tokenizer: Tokenizer
    sources: list[str]  # (N,) without the prefix
    references: list[str]  # (N,) the targets as text; [] without targets
    bleu_tokenizer: str  # sacrebleu's name of the tokenizer that BLEU uses; "": BLEU is not computed


def read_pairs(
    name: str, source: str, target: str, *, options: FileOptions = FileOptions(), more: Sequence[str] = ()
) -> Rows:
    """Return rows with a text in the columns `source` and `target` ("": no target, to predict); none is empty.

    format: parallel reads NAME.source and NAME.target, whose lines belong together; any other is one of read_rows,
    where the columns in `more` are required too. Raises one DataError with all errors of the file.
    """
    columns = [source, *([target] if target else [])]
    errors = ErrorList()
    if options.format == "parallel" and not is_in_memory(name):
        rows = read_parallel(name, columns, errors, options)
        for column in columns:
            check_texts(f"{name}.{column}", rows, [column], "", errors)
    else:
        _refuse_lines(name, columns, options)
        options = replace(options, hint=lambda found: _hint_at_columns(found, columns, options))
        rows = read_rows(name, [*columns, *more], options, errors)
        check_texts(name, rows, columns, "", errors)
    return errors.settle(rows, options)


def _refuse_lines(name: str, columns: Sequence[str], options: FileOptions) -> None:
    """Raise DataError, with the settings that read it, for one of two files of lines."""
    if is_in_memory(name) or options.format != "auto":
        return
    path = locate(name)
    suffix = suffix_of(path)
    if path.is_file() and suffix not in READERS and suffix not in NOT_READ:
        stem = str(name)[: -len(suffix)] if suffix and str(name).endswith(suffix) else str(name)
        settings = " and ".join(f"{options.settings.get(column, 'columns')} = ..." for column in columns)
        raise DataError(
            f"{name}: unknown kind of file {suffix!r}; rows are in {', '.join(READERS)}; two files whose lines belong "
            f"together are read as {stem!r} with data.format = 'parallel', their endings are {settings}"
        )


def _hint_at_columns(found: Sequence[str], wanted: Sequence[str], options: FileOptions) -> str:
    """Return which settings would read a file with these columns; "" for columns that are not known."""
    pair = next((pair for pair in KNOWN_PAIRS if set(pair) <= set(found)), None)
    languages = [column for column in found if LANGUAGE.fullmatch(column) and column != options.id_column]
    if pair is None and len(languages) == 2:
        pair = (languages[0], languages[1])
    if pair is None:
        return ""
    named = [
        f'{options.settings[column]} = "{known}"'
        for column, known in zip(wanted, pair, strict=False)
        if column in options.settings
    ]
    return f"{' and '.join(named)} would read it" if named else ""


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
    max_new_tokens: int = 0,
) -> TextExamples[Seq2SeqRecord]:
    """Encode prefix + source, truncated to `max_length` tokens, and the target, truncated to `max_target_length`.

    Both lengths include the special tokens: a truncated text still ends with the end token.
    target: a column, or "" for rows without. bleu_tokenizer: see Seq2SeqRecord.
    `truncated` counts the sources; `notes` name the targets too, and those longer than max_new_tokens; 0: none.
    """
    record = Seq2SeqRecord(
        tokenizer=processor.tokenizer,
        sources=[row.values[source] for row in rows],
        references=[row.values[target] for row in rows] if target else [],
        bleu_tokenizer=bleu_tokenizer,
    )
    prefixed = [Row(row.id, row.line, {source: prefix + row.values[source]}) for row in rows]
    examples = encode_texts(prefixed, processor.tokenizer, text=source, max_length=max_length)
    if not target:
        return examples.with_record(record)
    targets = encode_texts(
        rows,
        processor.tokenizer,
        text=target,
        max_length=max_target_length,
        limit="seq2seq.max_target_length",
        nouns="targets",
    )
    num_copied = sum(row.values[source] == row.values[target] for row in rows)
    num_too_long = int((targets.lengths > max_new_tokens).sum()) if max_new_tokens else 0
    limit = f"generate.max_new_tokens = {max_new_tokens}"
    return examples.with_record(
        record,
        target_ids=targets.input_ids,
        target_offsets=targets.offsets,
        decoder_start_id=processor.decoder_start_id,
        notes=(
            *examples.notes,
            *targets.notes,
            *warn_of_part(num_copied, len(rows), "targets", "are the source itself"),
            *warn_of_part(num_too_long, len(rows), "targets", f"are longer than {limit}: their ends are never written"),
        ),
    )
