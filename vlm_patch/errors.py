"""The two errors a user of this library meets."""


class UnsupportedModelError(ValueError):
    """The model cannot be patched: it is no vision-language model, or its attention cannot be
    reached.
    """


class PatchError(RuntimeError):
    """A patched model was used in a way that would give silently wrong results; the message says
    the cure.
    """
