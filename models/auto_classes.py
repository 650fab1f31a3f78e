"""Which class of transformers opens an export, and what is to be said where none gives the same results."""

from __future__ import annotations

from models import model_options
from models.multi_task import MultiTaskHead, one_task
from models.task_model import TaskModel

# The class of transformers that chooses the class of the model from config.json, by the head of the export.
AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "distilled-image-classification": "AutoModelForImageClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def auto_class(model: TaskModel) -> str:
    """Return the name of the class of transformers that opens an export; AutoModel where it has only the backbone."""
    return AUTO_CLASSES.get(model.head_name or "", "AutoModel") if not explain_export(model) else "AutoModel"


def explain_export(model: TaskModel) -> str:
    """Return a sentence on a head that transformers does not have; "" where it gives the same results as here.

    Vectors of texts have no head there: sentence-transformers pools the hidden states by the files of the checkpoint.
    """
    head, architecture, name = model.head, model.spec.architecture, model.head_name
    if head is None or name is None or name == "sentence-embedding":
        return ""
    if isinstance(head, MultiTaskHead):  # of which each task has an export of its own
        found = {task: explain_export(one_task(model, task)) for task in head.specs}
        return "; ".join(f"{task}: {sentence}" for task, sentence in found.items() if sentence)
    if name == "sentence-embedding":
        return ""  # AutoModel gives the hidden states, and SentenceTransformer the vectors
    model_type = architecture.weights.model_type
    if model_options.hub_class(architecture, name, head.shape.pooling) != architecture.heads[None]:
        return ""
    instead = (
        "transformers opens only the backbone of the export; load it by engine.predict_rows(FOLDER, rows), "
        f'models.from_pretrained(FOLDER, head="{name}"), or as a graph of python -m engine.export'
    )
    readable = architecture.heads.get(name) not in (None, architecture.heads[None])
    if readable and head.reads_pooled:
        return f"the classifier of a {model_type} in transformers cannot have pooling = {head.shape.pooling}: {instead}"
    return f"transformers has no {name} for a {model_type}: {instead}"
