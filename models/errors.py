"""The one error that bad model files raise."""


class ModelError(ValueError):
    """A checkpoint, or a request made of it, cannot be honoured; the message is one sentence for the user."""
