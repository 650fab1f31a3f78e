"""The one error for bad model files and for requests that do not fit them."""


class ModelError(ValueError):
    """A checkpoint, or a request to it, that cannot be fulfilled; the message is one sentence for the user."""
