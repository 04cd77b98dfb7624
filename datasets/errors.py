"""The errors that a user can do something about."""


class UserError(ValueError):
    """What the user has to change.

    Its message is one line: what was given, what is needed, what to do.
    """


class DamagedPicture(UserError):
    """A picture that cannot be read. ``InMemory`` names it in a warning and leaves it out."""
