"""The numbers that keep the random streams of a run apart.

A stream is seeded with (seed, ..., constant). The constants make streams with the same seed independent. Their values
have no other meaning, but a new value changes results. Streams without a constant have keys of different lengths: the
order of the examples (seed, epoch), augmentation (seed, epoch, id), dropout (seed, step, micro-batch, rank).
"""

VALIDATION_SPLIT = 0x5EED  # (seed, .): the rows that are held out for validation
TRAINING_SAMPLE = 0x11317  # (seed, .): the rows of data.max_train_examples
IMAGE_MIX = 0x313C  # (seed, epoch, id, .): the partner of an image in mixup and cutmix
STUDY_SAMPLE = 0x57D1  # (seed, .): the variants of a grid that a study runs (engine/study.py)
STUDY_TRIAL = 0x7A1  # (seed, ., trial): the values of a trial in the ranges of a study (engine/study_search.py)
BALANCED_CLASS = 0xBA1A  # (seed, epoch, .): the order of the classes in train.sampler = balanced
BALANCED_EXAMPLE = 0xC1A55  # (seed, class, .): the order of a class's examples there
MASKED_TOKENS = 0x3A5C  # (seed, epoch, id, .): the masks of a text in training; (id, .): in evaluation
CORRUPTED_SPANS = 0x5BA4  # (seed, epoch, id, .): the spans of a text in training; (id, .): in evaluation
