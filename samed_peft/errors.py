"""The one exception that means: the input is wrong, and here is how to mend it."""


class InputError(ValueError):
    """A file, folder or option of the user's cannot be used.

    The message says what was expected, what was found, in which file, and what to do. Recipes and the command
    line print it alone, without a traceback, and exit with code 2.
    """
