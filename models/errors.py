"""The one error for bad model files and for options that do not fit them."""


class ModelError(ValueError):
    """A bad model file, or options that do not fit it; the message is one sentence for the user."""
