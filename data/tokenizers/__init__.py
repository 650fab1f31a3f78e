"""Tokenizers, from whichever files a checkpoint folder has."""

from data.tokenizers.load import copy_tokenizer, load_tokenizer

__all__ = ["copy_tokenizer", "load_tokenizer"]
