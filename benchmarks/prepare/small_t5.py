"""The configuration of a small T5 and a tokenizer trained on texts, for training from scratch.

No package has a pretrained T5. Used by django_messages.py, package_descriptions.py and benchmarks/workloads.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizers.copying import settings_of
from data.writing import to_json

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]  # with the ids of published T5 models
CONFIG = {
    "model_type": "t5",
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,  # untied embeddings learn much faster from scratch
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def write_small_t5(
    folder: Path, texts: Iterable[str], *, vocab_size: int, num_sentinels: int = 0, **changes: Any
) -> None:
    """Write config.json and a BPE tokenizer.json trained on `texts` to `folder`. changes: keys of config.json.

    num_sentinels: tokens that stand for spans which are cut out, added behind the others, <extra_id_0> at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(num_sentinels))])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size()} | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    settings = to_json(settings_of(folder), indent=2)  # transformers' own class for a T5 reads no BPE
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
