"""The one error of the launcher."""


class LauncherError(Exception):
    """What is missing and what to do about it, in one line. The command prints it and exits with 1."""
