"""Import-only stand-in for triton (saves ~0.2 GB download / ~0.7-1 GB on disk).

SGLang decorates many kernels at import; on its CPU path none of them is launched.
A launched kernel raises, so nothing can go silently wrong.
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "3.7.1"


class _Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(f"{cls.__name__}.{name}")

    def __getitem__(cls, item):
        return cls

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class _Base(metaclass=_Meta):
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __init_subclass__(cls, **kwargs):
        pass


def _make(name):
    return _Meta(name, (_Base,), {})


class JITFunction:
    def __init__(self, fn):
        self.fn, self.__name__, self.__doc__ = fn, getattr(fn, "__name__", "kernel"), getattr(fn, "__doc__", None)
        self.__module__ = getattr(fn, "__module__", __name__)

    def __getitem__(self, grid):
        raise NotImplementedError(f"triton stub: kernel {self.__name__} launched")

    __call__ = __getitem__


def _decorator(*args, **kwargs):
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0] if isinstance(args[0], JITFunction) else JITFunction(args[0])
    return lambda fn: fn if isinstance(fn, JITFunction) else JITFunction(fn)


jit = autotune = heuristics = _decorator


def cdiv(a, b):
    return -(a // -b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length() if n > 0 else 1


class Config(_Base):
    pass


class _Stub(types.ModuleType):
    __path__ = []  # noqa: RUF012

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "JITFunction":
            return JITFunction
        if name in ("jit", "autotune", "heuristics"):
            return _decorator
        value = _make(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        # torch._inductor and SGLang import many submodules
        if fullname.startswith("triton."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    import importlib

    return importlib.import_module(f"triton.{name}") if name[0].islower() else _make(name)
