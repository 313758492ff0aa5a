"""The one exception type for input a user can correct, and the one warning."""


class InputError(ValueError):
    """A value the user gave cannot be used. Its message is one sentence: the value, and what is allowed.

    The command line prints it and exits with code 2; everything else is a bug and keeps its traceback.
    """


class DraftAttentionWarning(UserWarning):
    """Something the user may want to change. Its message is one sentence, which the command line prints once."""
