"""Whether ms-swift arguments ask to keep MTP layers that a save loses.

This file imports nothing heavy: `autoload` uses it in every process that imports ms-swift.
"""

import json
import os

KEEP = "fastmtp_keep_mtp"
"""A training's callback, and a merge's key of `--model_kwargs`."""


def keeps_mtp(args) -> bool:  # type: ignore[no-untyped-def]
    """Whether ms-swift arguments ask to keep MTP layers: `--callbacks fastmtp_keep_mtp`; for a merge, the same in the
    run that made the adapter, or `--model_kwargs '{"fastmtp_keep_mtp": true}'`, which goes before it."""
    if KEEP in (getattr(args, "callbacks", None) or []):
        return True
    if not getattr(args, "merge_lora", False):
        return False
    asked = _object(getattr(args, "model_kwargs", None)).get(KEEP)
    if asked is not None:
        return str(asked).lower() in ("true", "1", "yes", "on")
    try:
        with open(os.path.join(getattr(args, "ckpt_dir", None) or "", "args.json"), encoding="utf-8") as file:
            run = _object(file.read())
    except (OSError, ValueError):
        return False  # ms-swift reads that file next, and says what is wrong with it
    return KEEP in (run.get("callbacks") or [])


def _object(value) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """An object, or one that is written as JSON; what is neither is ms-swift's to refuse."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}
