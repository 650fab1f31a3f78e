"""Poems of the Tang and Song dynasties, one per line.

    python -m benchmarks.prepare chinese_poems

Source: tang300 and song100 of Debian's package fortunes-zh. The poems are a thousand years old, but the collection is
GPL-3 and is therefore not redistributed. `apt-get download` fetches it on Debian or Ubuntu with package lists.

Output:
- train.txt and validation.txt (a tenth of the poems): title, colon, poem, without the poet;
- model/: the configuration of a small GPT-2 and a byte-level BPE trained on the training poems, in which no character
  is unknown. It is trained from scratch, since no package has a pretrained Chinese GPT-2.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

PACKAGE, MEMBERS = "fortunes-zh", ("tang300", "song100")
HELD_OUT = 0.1
END = "<|endoftext|>"
VOCABULARY = 2000
CONFIG = {
    "model_type": "gpt2",
    "n_positions": 256,
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.2,
    "resid_pdrop": 0.2,
}


def read_poems() -> list[str]:
    """Return each poem once, as one line, in the order of the files."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=folder, check=True)
        subprocess.run(["dpkg-deb", "--extract", str(next(Path(folder).glob("*.deb"))), folder], check=True)
        texts = [(Path(folder) / "usr/share/games/fortunes" / name).read_text(encoding="utf-8") for name in MEMBERS]
    poems = [format_poem(entry) for text in texts for entry in re.split(r"^%$", text, flags=re.MULTILINE)]
    return list(dict.fromkeys(poem for poem in poems if poem))


def format_poem(entry: str) -> str:
    """Return "title: poem" without colour codes, spaces and the poet; "" if the entry has no title."""
    lines = [re.sub(r"\x1b\[\d*m|\s", "", line) for line in entry.splitlines()]
    lines = [line for line in lines if line and not line.startswith("作者")]
    title = re.fullmatch(r"(?:题目:)?《(.+)》", lines[0]) if len(lines) > 1 else None
    return f"{title[1]}：{''.join(lines[1:])}" if title else ""


def write_model(folder: Path, poems: list[str]) -> None:
    """Write config.json and tokenizer.json."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(poems, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.token_to_id(END))
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size()} | ends
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def prepare(folder: Path) -> None:
    """Write train.txt, validation.txt and model/."""
    poems = read_poems()
    order = list(range(len(poems)))
    random.Random(0).shuffle(order)
    held_out = set(order[: round(len(poems) * HELD_OUT)])
    splits = {"train": [poem for i, poem in enumerate(poems) if i not in held_out]}
    splits["validation"] = [poem for i, poem in enumerate(poems) if i in held_out]
    for name, lines in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_model(folder / "model", splits["train"])
