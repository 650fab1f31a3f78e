"""Text generation: greedy search, sampling and beam search, with a cache of keys and values."""

from models.generation.generate import Generated, generate
from models.generation.settings import GenerationSettings

__all__ = ["Generated", "GenerationSettings", "generate"]
