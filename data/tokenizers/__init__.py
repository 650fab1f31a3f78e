"""Tokenizers, from the files of a checkpoint folder."""

from data.tokenizers.copying import copy_tokenizer
from data.tokenizers.load import load_tokenizer

__all__ = ["copy_tokenizer", "load_tokenizer"]
