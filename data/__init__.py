"""Files -> rows -> examples -> the micro-batches of each optimizer step. See data/README.md."""

from data.batch import IGNORE_INDEX, Batch, totals
from data.errors import DataError
from data.examples import TextExamples
from data.formats.memory import in_memory
from data.formats.rows import read_rows
from data.loader import Examples, MicroBatching, evaluation_batches, steps_per_epoch, training_steps
from data.row import Row, Rows
from data.split import sample_rows, split_rows
from data.tokenizers.copying import copy_tokenizer
from data.tokenizers.load import load_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "DataError",
    "Examples",
    "MicroBatching",
    "Row",
    "Rows",
    "TextExamples",
    "copy_tokenizer",
    "evaluation_batches",
    "in_memory",
    "load_tokenizer",
    "read_rows",
    "sample_rows",
    "split_rows",
    "steps_per_epoch",
    "totals",
    "training_steps",
]
