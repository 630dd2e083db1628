"""FastMTP for stock ms-swift and stock SGLang: train, export and measure multi-token-prediction draft heads.

These names are the package's interface beside the command lines; they are imported when they are first used, so
importing the package costs nothing. `docs/dev.md` says where everything else is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint
    from .data.clean import clean
    from .data.distill import distill
    from .data.mix import mix
    from .errors import FastMTPError
    from .export.doctor import examine
    from .export.folders import export_draft, export_full
    from .export.graft import graft
    from .export.inspection import inspect_model
    from .method.config import FastMTPConfig
    from .method.losses import fastmtp_loss
    from .method.rollout import rollout
    from .model.loading import load_model
    from .serving.launch import serve_flags

__all__ = [
    "Checkpoint",
    "FastMTPConfig",
    "FastMTPError",
    "clean",
    "distill",
    "examine",
    "export_draft",
    "export_full",
    "fastmtp_loss",
    "graft",
    "inspect_model",
    "load_model",
    "mix",
    "rollout",
    "serve_flags",
]

_MODULES = {
    "Checkpoint": "checkpoint.checkpoint",
    "FastMTPConfig": "method.config",
    "FastMTPError": "errors",
    "clean": "data.clean",
    "distill": "data.distill",
    "examine": "export.doctor",
    "export_draft": "export.folders",
    "export_full": "export.folders",
    "fastmtp_loss": "method.losses",
    "graft": "export.graft",
    "inspect_model": "export.inspection",
    "load_model": "model.loading",
    "mix": "data.mix",
    "rollout": "method.rollout",
    "serve_flags": "serving.launch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
