"""Tokenizers, from the files of a checkpoint folder."""

from data.tokenizers.load import copy_tokenizer, load_tokenizer

__all__ = ["copy_tokenizer", "load_tokenizer"]
