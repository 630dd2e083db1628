"""The backbone's hidden states of the measured texts, computed once for all heads.

The backbone is the same for every head, and most of the work: so its states are kept in a temporary folder, as a run of
several epochs keeps them (`model/hidden_cache.py`), bit for bit. Texts for which there is no room are computed for each
head.
"""

import shutil
import tempfile
from typing import Any

from ..model.hidden_cache import HiddenCache

SHARE_OF_DISK = 0.5
"""Of the temporary folder's free space that states may take."""


class States:
    """`with States(passes) as states:` and before each head `states.keep_of(model)`.

    Args:
        passes: over the texts; with one, nothing is kept.
    """

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._folder = tempfile.TemporaryDirectory(prefix="fastmtp-states-")
        self._caches: dict[bool, HiddenCache] = {}

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def keep_of(self, model: Any) -> None:
        """Let the model keep and read the states that its head gets: engines differ in which these are."""
        if self._passes < 2:
            return
        before_norm = model.head.graph.hidden_before_norm
        if before_norm not in self._caches:
            room = int(shutil.disk_usage(self._folder.name).free * SHARE_OF_DISK)
            folder = f"{self._folder.name}/{'before' if before_norm else 'after'}-the-norm"
            self._caches[before_norm] = HiddenCache(folder, {}, model.config.hidden_size, model.dtype, room)
        model.hidden_cache = self._caches[before_norm]
