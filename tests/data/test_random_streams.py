"""The constants of random streams: no two are equal, and none has changed, since a change would change results."""

from __future__ import annotations

from data import random_streams


def test_streams_are_apart_and_unchanged():
    values = {name: value for name, value in vars(random_streams).items() if name.isupper()}
    assert values == {
        "VALIDATION_SPLIT": 0x5EED,
        "TRAINING_SAMPLE": 0x11317,
        "IMAGE_MIX": 0x313C,
        "STUDY_SAMPLE": 0x57D1,
        "STUDY_TRIAL": 0x7A1,
        "BALANCED_CLASS": 0xBA1A,
        "BALANCED_EXAMPLE": 0xC1A55,
        "MASKED_TOKENS": 0x3A5C,
        "CORRUPTED_SPANS": 0x5BA4,
    }
    assert len(set(values.values())) == len(values)
