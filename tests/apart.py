"""A device apart, for machines without a GPU.

Its tensors are not the CPU's, mixing the two is an error as it is on a GPU, and numbers read from it are counted.

It computes with the CPU, so that what it gives must be what the CPU gives. It goes by the name of a device that every
build of PyTorch has, "meta"; the tensors of that device have no values, these have.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import advdpnp.core
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APART = torch.device("meta")
BOTH = {torch.ops.aten.copy_, torch.ops.aten._to_copy}  # may see both devices
# indices may be the CPU's
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}

_tensor, _save, _load, _Generator = torch.tensor, torch.save, torch.load, torch.Generator


class Apart(torch.Tensor):
    "A tensor of the device."

    @staticmethod
    def __new__(cls, values):
        of_values = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, **of_values, device=APART)
        tensor.values_apart = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with Device():
            return function(*args, **(kwargs or {}))

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data):
        return _tensor(data, dtype=self.dtype).to(APART)

    def __format__(self, spec):
        return format(self.item(), spec)


class Device(TorchDispatchMode):
    "Inside, the device is there."

    reads, seeds = 0, set()  # numbers that were read from the device; seeds of its generators

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, operation = dict(kwargs or {}), function.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        apart = [tensor for tensor in tensors if isinstance(tensor, Apart)]
        target, first = kwargs.get("device"), isinstance(args[0], Apart) if args else False
        onto = torch.device(target) == APART if target is not None else bool(apart)
        if operation in BOTH | INDEXING and target is None:
            onto = first
        allowed = operation in BOTH or operation in INDEXING and first
        if apart and not allowed and any(tensor.ndim for tensor in tensors if not isinstance(tensor, Apart)):
            raise RuntimeError(
                f"{function} was given tensors of two devices: {[(type(t).__name__, tuple(t.shape)) for t in tensors]}"
            )
        generator = kwargs.get("generator")
        if generator is not None and (generator.initial_seed() in Device.seeds) != onto:
            raise RuntimeError(f"{function} was given a generator of another device")
        read = operation in BOTH and not onto or operation is torch.ops.aten._local_scalar_dense
        leaves = bool(apart) and read
        Device.reads += leaves
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        plain = lambda leaf: leaf.values_apart if isinstance(leaf, Apart) else leaf
        result = function(*tree_map(plain, args), **tree_map(plain, kwargs))
        known = {id(tensor.values_apart): tensor for tensor in apart}  # what was changed in place is what it was
        wrap = lambda leaf: known[id(leaf)] if id(leaf) in known else Apart(leaf)
        return tree_map(lambda leaf: wrap(leaf) if onto and isinstance(leaf, torch.Tensor) else leaf, result)


class ApartGenerator(torch.Generator):
    "A random generator of the device."

    device = APART

    def manual_seed(self, seed):
        Device.seeds.add(super().manual_seed(seed).initial_seed())
        return self


@contextmanager
def device_apart():
    "Inside, device \"meta\" is a device apart; autocast is not for it."
    there = lambda device: device is not None and torch.device(device) == APART

    def tensor(data, *, device=None, **how):
        return _tensor(data, **how).to(device) if there(device) else _tensor(data, device=device, **how)

    def save(state, *args, **how):
        return _save(tree_map(lambda leaf: leaf.values_apart if isinstance(leaf, Apart) else leaf, state), *args, **how)

    def load(file, map_location=None, **how):
        state = _load(file, map_location="cpu" if there(map_location) else map_location, **how)
        move = lambda leaf: leaf.to(APART) if isinstance(leaf, torch.Tensor) else leaf
        return tree_map(move, state) if there(map_location) else state

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(advdpnp.core, "DEVICES", ("cpu", "meta")))
        for name, what in dict(
            tensor=tensor,
            save=save,
            load=load,
            autocast=lambda *args, **how: nullcontext(),
            Generator=lambda device="cpu": ApartGenerator() if there(device) else _Generator(device),
        ).items():
            stack.enter_context(mock.patch.object(torch, name, what))
        yield stack.enter_context(Device())
