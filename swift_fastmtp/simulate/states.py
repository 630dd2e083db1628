"""The backbone's hidden states of the measured texts, computed once for all heads.

The backbone is the same for every head, and most of the work: so its states are kept, as a run of several epochs keeps
them (`model/hidden_cache.py`), bit for bit: in a folder that the user names, where a run may have left them already, or
in a temporary one. Texts for which there is no room are computed for each head.
"""

import shutil
import tempfile
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..model.hidden_cache import HiddenCache, states_depend_on

SHARE_OF_DISK = 0.5
"""Of the free space where the folder is that states may take."""


class States:
    """`with States(passes) as states:` and before each head `states.keep_of(model)`.

    Args:
        passes: over the texts; with one, nothing is kept, unless in a named folder.
        named: the user's folder.
    """

    def __init__(self, passes: int, named: str | None = None) -> None:
        self._passes = passes
        self._named = named
        self._folder = tempfile.TemporaryDirectory(prefix="fastmtp-states-")
        self._caches: dict[bool, HiddenCache] = {}

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def keep_of(self, model: Any) -> None:
        """Let the model keep and read the states that its head gets: engines differ in which these are.

        Raises `FastMTPError` for a named folder of another model, dtype or kind of states.
        """
        if self._passes < 2 and not self._named:
            return
        before_norm = model.head.graph.hidden_before_norm
        if before_norm not in self._caches:
            self._caches[before_norm] = self._open(model, before_norm)
        model.hidden_cache = self._caches[before_norm]

    def _open(self, model: Any, before_norm: bool) -> HiddenCache:
        width, dtype = model.config.hidden_size, model.dtype
        if self._named:
            base = Checkpoint(model.name_or_path)
            key = states_depend_on(model, base.fingerprint, None, base.value("quantization_config"))
            cache = HiddenCache(self._named, key, width, dtype, max_bytes=0, named_by="--hidden_cache")
        else:
            folder = f"{self._folder.name}/{'before' if before_norm else 'after'}-the-norm"
            cache = HiddenCache(folder, {}, width, dtype, max_bytes=0)
        cache.max_bytes = cache.num_bytes + int(shutil.disk_usage(cache.folder).free * SHARE_OF_DISK)
        return cache
