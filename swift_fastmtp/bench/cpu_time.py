"""How much CPU time a server has used: what it costs where the clock on the wall also shows what others do.

Read from /proc, for the server's whole tree of processes; elsewhere than on Linux it is not known.
"""

import os

from .watchdog import IS_LINUX, descendants

_TICKS = os.sysconf("SC_CLK_TCK") if IS_LINUX else 1
# In /proc/PID/stat behind the name: user and system time of the process, then of its children that have ended.
_TIMES = slice(11, 15)


class CpuClock:
    """CPU seconds of everything below one process, from the time on at which the clock is made.

    A process that is started later counts when it has ended and its parent has taken notice.
    """

    def __init__(self, root: int) -> None:
        self._processes = descendants(root)
        self._last = self._total()

    def lap(self) -> float | None:
        """CPU seconds since the last lap, or the beginning; None where they are not known."""
        if not self._processes:
            return None
        before, self._last = self._last, self._total()
        return max(0.0, self._last - before)

    def _total(self) -> float:
        return sum(_ticks(process) for process in self._processes) / _TICKS


def _ticks(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            # The name, in brackets, may hold anything: what counts stands behind it.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:  # it has ended
        return 0
    return sum(map(int, fields[_TIMES]))
