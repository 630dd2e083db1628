"""A device that is not the CPU, on a machine that has no other: what computes there, and mixes up the two, is found.

A tensor of this device holds a CPU tensor, and computes what that one does; an operation that gets tensors of both
devices raises, as on a GPU, but for those that GPUs allow: copies, scalars, and indices from the CPU. Of torch itself,
PrivateUse1 is the key for such backends, and `torch.utils.backend_registration` makes one in Python (torch 2.13).

Made once in a process, and never taken away: tests that use it run in a process of their own.
"""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "other"
backend_registration._setup_privateuseone_for_python_backend(NAME)

_CROSSING = {"_to_copy", "copy_", "_local_scalar_dense"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}


class Other(torch.Tensor):
    """A tensor on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), dtype=inner.dtype, device=torch.device(NAME, 0), **layout
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    # What torch does with lists of Python does not pass the dispatcher.

    def tolist(self):
        return self.inner.tolist()

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index, value):
        super().__setitem__(torch.tensor(index) if isinstance(index, list) else index, value)

    def __repr__(self):
        return f"Other({self.inner!r})"


class OtherDevice(TorchDispatchMode):
    """`with OtherDevice():` tensors can be made on the device `NAME`, also from what is no tensor yet."""

    def __enter__(self):
        self.tensor = torch.tensor
        torch.tensor = self.make
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.tensor
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def make(self, data, *, device=None, **options):
        """torch fills a new tensor where the dispatcher does not look; a copy to the device it sees."""
        tensor = self.tensor(data, **options)
        return tensor if device is None else tensor.to(device)


def move(module):
    """Parameters and buffers of a module to the device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(Other(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Other(buffer)
    return module


def _run(function, args, kwargs):
    name = function._schema.name.split("::")[1]
    device = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, Other) for tensor in tensors)
    if here and name not in _CROSSING:
        _check(name, tensors[:1] + list(args[2:3]) if name in _INDEXING else tensors)
    result_here = here if device is None else torch.device(device).type == NAME
    if name == "copy_":
        result_here = isinstance(args[0], Other)
    if not here and not result_here:
        return function(*args, **kwargs)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if result_here:
        result = tree_map(lambda leaf: Other(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return result if name == "_to_copy" else return_and_correct_aliasing(function, args, kwargs, result)


def _inner(leaf):
    return leaf.inner if isinstance(leaf, Other) else leaf


def _check(name, tensors):
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if any(tensor.ndim and not isinstance(tensor, Other) for tensor in tensors):
        shapes = [f"{list(t.shape)} on {NAME if isinstance(t, Other) else 'the CPU'}" for t in tensors]
        raise RuntimeError(f"{name}: tensors on two devices: {', '.join(shapes)}")
