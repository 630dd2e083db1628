"""Makes plain `swift sft --model_type fastmtp` work after `pip install`.

`swift_fastmtp_autoload.pth`, or from Python 3.15 on `swift_fastmtp_autoload.start` (PEP 829), calls `install` when
Python starts. It adds one finder that waits for ms-swift's argument class to be imported; a process that never imports
ms-swift pays for one string comparison per import.
When that class is about to load external plugins and the arguments name `fastmtp`, the plugin is one of them. Where
they ask for no more than `fastmtp_keep_mtp`, only that is registered (`keep.py`), and the model stays ms-swift's own.
`SWIFT_FASTMTP_AUTOLOAD=0` switches all of it off.
"""

import os
import sys

TARGET = "swift.arguments.base_args.base_args"


class _Finder:
    """Steps aside for the real finders, and wraps the loader of one module."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != TARGET:
            return None
        import importlib.util

        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        original = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            original(module)
            _hook(module.BaseArguments)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _hook(arguments_class) -> None:  # type: ignore[no-untyped-def]
    from .compat_swift import before_plugins, load_among_plugins
    from .keep_asked import keeps_mtp
    from .typed import watch

    watch(arguments_class)
    load_among_plugins(arguments_class, names_fastmtp)
    before_plugins(arguments_class, keeps_mtp, _register_keep)


def _register_keep() -> None:
    from .keep import register_keep

    register_keep()


def names_fastmtp(args) -> bool:  # type: ignore[no-untyped-def]
    """Whether ms-swift arguments ask for anything of ours. Values from a checkpoint's args.json are there already."""
    if "fastmtp" in (getattr(args, key, None) for key in ("model_type", "loss_type", "tuner_type")):
        return True
    datasets = [*(getattr(args, "dataset", None) or []), *(getattr(args, "val_dataset", None) or [])]
    return any(str(d).startswith("fastmtp-") for d in datasets)


def install() -> None:
    """Add the finder, unless it is there, switched off, or too late."""
    if os.environ.get("SWIFT_FASTMTP_AUTOLOAD") == "0" or TARGET in sys.modules or _Finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _Finder)
