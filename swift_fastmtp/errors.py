"""The one exception users are meant to read.

Every check of user input (a knob, a checkpoint, a dataset, an output folder) raises `FastMTPError` with one
line that names what is wrong and how to mend it. The command line prints that line and exits with 1; no
traceback, because the mistake is not in the program.
"""


class FastMTPError(ValueError):
    """Bad input. The message is one line: what is wrong (file, key or row) and the mend."""
