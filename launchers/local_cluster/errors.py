"""The one error that a user may see."""


class ClusterError(Exception):
    """What is wrong, in one line; the command prints it without a traceback and ends with exit code 2."""
