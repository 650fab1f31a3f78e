"""The sections of a recipe that only some tasks read: augmentation, generation, and the sections of one task each."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import setting

SCHEMES = ("auto", "IOB1", "IOB2", "IOBES", "BMES", "BILOU", "BMEWO", "none")


@dataclass(frozen=True)
class TextAugmentSettings:
    """Text augmentation; rates count words, or characters in texts without spaces."""

    crop: float = setting(0.0, "largest share of a text that is removed at its ends", within="in [0, 1)")
    delete: float = setting(0.0, "share of the words that are removed", within="in [0, 1)")
    swap: float = setting(0.0, "share of the words that are swapped with a neighbour", within="in [0, 1)")
    mask: float = setting(0.0, "share of the words that are replaced by the tokenizer's mask", within="in [0, 1)")
    fill: float = setting(
        0.0, "number of words of other texts that are inserted, as a share of the text's own", within="in [0, 1)"
    )
    synonym_file: str = setting("", "file of synonyms, .tsv or .jsonl; empty: none")
    synonym_rate: float = setting(
        0.1, "share of the words with synonyms that are replaced by one of them", within="in [0, 1]"
    )
    back_translation_file: str = setting(
        "", "file of paraphrases by id, .jsonl; each epoch takes the text or one of them; empty: none"
    )


@dataclass(frozen=True)
class ImageAugmentSettings:
    """Image augmentation in the order of its steps; mixup and cutmix then combine two images and their labels."""

    random_crop_min_scale: float = setting(
        0.0, "smallest share of the area that a random crop keeps; 0: no crop", within="in [0, 1)"
    )
    horizontal_flip: float = setting(0.0, "probability of a horizontal flip", within="in [0, 1]")
    rotation_degrees: float = setting(0.0, "largest rotation in either direction, in degrees", within="in [0, 180]")
    color_jitter: float = setting(
        0.0,
        "strength of random changes of brightness, contrast and saturation; the hue changes by a quarter of it",
        within="in [0, 1]",
    )
    auto_augment: str = setting(
        "none", "torchvision's policy of random transforms", ("none", "randaugment", "trivialaugment")
    )
    random_erasing: float = setting(0.0, "probability that a random rectangle is erased", within="in [0, 1]")
    mixup: float = setting(0.0, "alpha of mixup's Beta distribution; 0: no mixup", within=">= 0")
    cutmix: float = setting(0.0, "alpha of cutmix's Beta distribution; 0: no cutmix", within=">= 0")


@dataclass(frozen=True)
class AugmentSettings:
    """Augmentation of the training examples: a function of the seed, the epoch and the example's id."""

    text: TextAugmentSettings = TextAugmentSettings()
    image: ImageAugmentSettings = ImageAugmentSettings()


@dataclass(frozen=True)
class GenerateSettings:
    """Text generation in evaluation and prediction; a checkpoint's own generation settings are not used."""

    max_new_tokens: int = setting(64, "longest generated text, in tokens", within="> 0")
    num_beams: int = setting(1, "number of beams of beam search; 1: greedy search, or sampling", within="> 0")
    do_sample: bool = setting(False, "sample each token; false: take the most probable")
    temperature: float = setting(1.0, "sampling: divisor of the logits; below 1 favours probable tokens", within="> 0")
    top_k: int = setting(50, "sampling: number of most probable tokens to choose from; 0: all", within=">= 0")
    top_p: float = setting(
        1.0, "sampling: choose from the most probable tokens that reach this probability together", within="in (0, 1]"
    )
    seed: int = setting(0, "sampling: seed of the random choices", within=">= 0")
    no_repeat_ngram_size: int = setting(
        0, "length of the runs of tokens that may not repeat; 0: any may", within=">= 0"
    )
    length_penalty: float = setting(
        1.0, "beam search: a beam's score is divided by its length to this power", within="in [-10, 10]"
    )


@dataclass(frozen=True)
class TokenClassificationSettings:
    """Settings of the task token-classification alone."""

    tag_scheme: str = setting(
        "auto", "scheme of the entity tags; auto: found from the data; none: each tag is a class of its own", SCHEMES
    )
    bad_tags: str = setting(
        "raise",
        "tags that break their scheme, such as I-PER after O; raise: stop and name them; repair: change them to what "
        "conlleval and seqeval read, and count them",
        ("raise", "repair"),
    )
    bad_spans: str = setting(
        "raise",
        "spans of entities that cut a word or overlap; raise: stop and name them; expand: extend them to whole words; "
        "skip: leave them out; of overlapping spans, expand and skip keep the longest",
        ("raise", "expand", "skip"),
    )


@dataclass(frozen=True)
class QuestionAnsweringSettings:
    """Settings of the task question-answering alone."""

    doc_stride: int = setting(64, "tokens that two neighbouring windows of a long context share", within=">= 0")
    max_answer_length: int = setting(30, "longest answer, in tokens", within="> 0")
    no_answer_threshold: float = setting(
        0.0, "answer nothing if the score of no answer exceeds the best answer's by more than this"
    )


@dataclass(frozen=True)
class RelationExtractionSettings:
    """Settings of the task relation-extraction alone."""

    no_relation_label: str = setting("no_relation", "label for no relation, which does not count in F1")


@dataclass(frozen=True)
class MultipleChoiceSettings:
    """Settings of the task multiple-choice alone."""

    choice_columns: tuple[str, ...] = setting(
        (),
        "column with the list of choices, or a column for each choice; empty: choices, options, endings, or numbered "
        "ones such as ending0, ending1",
    )
    first_label: int = setting(0, "number of the first choice, where labels are numbers", within="in [0, 1]")


@dataclass(frozen=True)
class MaskedLMSettings:
    """Settings of the task masked-lm alone."""

    mask_probability: float = setting(
        0.15, "share of the tokens that are masked, at least one in each example", within="in (0, 1]"
    )
    whole_words: bool = setting(False, "mask all tokens of a word together; false: each token alone")
    segmenter: str = setting(
        "",
        "with whole_words, what finds the words of Chinese and Japanese: a file with a word a line, or jieba; empty: "
        "each character is a word",
    )
    concatenate_texts: bool = setting(
        False, "concatenate the texts and split them into blocks of data.max_length; false: one example per text"
    )


@dataclass(frozen=True)
class SpanCorruptionSettings:
    """Settings of the task span-corruption alone."""

    noise_density: float = setting(0.15, "share of the tokens that are cut out of a text", within="in (0, 1]")
    mean_span_length: float = setting(3.0, "mean number of tokens that are cut out together", within="> 0")
    concatenate_texts: bool = setting(
        False, "concatenate the texts and split them into blocks of data.max_length; false: one example per text"
    )


@dataclass(frozen=True)
class SentenceEmbeddingSettings:
    """Settings of the task sentence-embedding alone."""

    similarity: str = setting(
        "cosine",
        "similarity of two vectors; cosine: of vectors that are divided by their length, also when they are written; "
        "dot: the dot product",
        ("cosine", "dot"),
    )
    scale: float = setting(20.0, "factor of the similarities in the loss: 1 / temperature", within="> 0")
    negative_columns: tuple[str, ...] = setting(
        (), "columns with texts that do not answer the anchor (hard negatives); a row may lack them; empty: none"
    )


@dataclass(frozen=True)
class MultiTaskSettings:
    """Settings of the task multi-task alone: several tasks, each with its files and its head, on one model."""

    recipes: tuple[str, ...] = setting(
        (),
        "recipes of the tasks, by path or name; each gives its run.task, [data], [augment], the task's own section, "
        "and the metric it watches; all else is of this recipe",
    )
    weights: tuple[str, ...] = setting(
        (), "how much an example of each task counts in the loss, in the order of recipes; empty: all 1"
    )


@dataclass(frozen=True)
class CausalLMSettings:
    """Settings of the task causal-lm alone."""

    concatenate_texts: bool = setting(
        False, "concatenate the texts and split them into blocks of data.max_length; false: one example per text"
    )
    document_mask: bool = setting(
        False,
        "in a block of concatenated texts, attention and positions restart with each text; false: a token attends to "
        "the texts before its own",
    )


@dataclass(frozen=True)
class Seq2SeqSettings:
    """Settings of the tasks summarization and translation alone."""

    source_prefix: str = setting("", "text put before every source, such as 'summarize: '; empty: none")
    max_target_length: int = setting(128, "longest target, in tokens; longer targets are truncated", within="> 0")


@dataclass(frozen=True)
class ImageClassificationSettings:
    """Settings of the tasks image-classification and multi-label-image-classification alone."""

    max_pixels: int = setting(
        89_478_485, "largest number of pixels (width x height) of an image; larger ones are bad rows", within="> 0"
    )
