"""The two errors a user of this library meets."""


class UnsupportedModelError(ValueError):
    """The model cannot be patched: it is no vision-language model, or its attention cannot be
    reached.

        try:
            patch = wrap(model, VAR())
        except UnsupportedModelError as error:
            print(error)  # what was found, what was expected, the cure
    """


class PatchError(RuntimeError):
    """A patched model was used in a way that would give silently wrong results; the message names
    the cure.

        wrap(model, VAR()), wrap(model, VHR())  # raises: already wrapped
    """
