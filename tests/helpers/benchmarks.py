"""The benchmarks of this repository, as modules."""

import importlib.util
import sys

from helpers.paths import ROOT


def load(name):
    path = ROOT / "benchmarks" / name
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))
