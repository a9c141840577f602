"""Model outputs whose logits (and cache) are computed, with their graph, when something first reads them.

Attribute, key, index, `to_tuple` and `dict` give the tensor. `items` and `values` give a stand-in until then, because
accelerate rebuilds every output of a mixed-precision step from its items, with `float()` on each half-precision one.
FSDP looks for tensors in the fields of dataclasses and in the values of dicts: to it an output is a dict alone.
ZeRO-3 reads whatever `keys` names, in each forward: of a model that it has sharded, `keys` leaves out what is deferred.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_OPERATORS = ("getitem", "len", "iter", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul")


class Deferred:
    """Stands in for a field of an output that nothing has read.

    Args:
        compute: gives the field.
    """

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = None

    def value(self) -> Any:
        """The field, computed the first time."""
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


class DeferredLogits(Deferred):
    """Stands in for logits that nothing has read; any use of it other than `dtype` and `float()` computes them.

    Args:
        compute: gives the logits.
        dtype: theirs.
    """

    def __init__(self, compute: Callable[[], Tensor], dtype: torch.dtype) -> None:
        super().__init__(compute)
        self.dtype = dtype

    def float(self) -> DeferredLogits:
        """The logits in float32, deferred as they are."""
        return DeferredLogits(lambda: self.value().float(), torch.float32)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a bare instance, as copy makes one
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.value() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


class Draws:
    """PyTorch's random numbers from now on, to be drawn once more.

    Args:
        device: on which, beside the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._devices = [] if device.type == "cpu" else [device]
        self._states = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw them; afterwards the generators stand where they stood before."""
        kind = self._devices[0].type if self._devices else "cuda"
        with torch.random.fork_rng(self._devices, device_type=kind):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.get_device_module(device).set_rng_state(state, device)
            yield


def _operator(name: str) -> Callable:
    def method(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.value(), name)(*args)

    method.__name__ = name
    return method


for _name in _OPERATORS:
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


def lazy_output(
    model: Any, output_class: type, compute: Callable[[], Tensor], dtype: torch.dtype, **fields: Any
) -> Any:
    """An output of (a subclass of) `output_class` with deferred logits.

    Gradient mode and autocast are those of now, not of the moment of reading.

    Args:
        model: whose output it is.
        output_class: of transformers, with a field `logits`.
        compute: gives the logits; dtype: theirs.
        fields: the other fields, the loss among them; each may be `Deferred`.
    """
    device = fields["loss"].device.type
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
    autocast_dtype = torch.get_autocast_dtype(device)

    def run() -> Tensor:
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype=autocast_dtype, enabled=autocast):
            return compute()

    output = _lazy_class(output_class)(**fields, logits=DeferredLogits(run, dtype))
    output.__dict__["_hides"] = hasattr(next(model.parameters()), _SHARDED)
    return output


_FIELDS = "__dataclass_fields__"  # by which a dataclass is known
_SHARDED = "ds_id"  # by which ZeRO-3 knows its parameters, all of a model's


class _NoDataclass(type):
    """Of a class whose base is a dataclass, and which does not look like one."""

    def __getattribute__(cls, name: str) -> Any:
        if name == _FIELDS:
            raise AttributeError(name)
        return super().__getattribute__(name)


@functools.cache
def _lazy_class(output_class: Any) -> Any:
    names = tuple(output_class.__dataclass_fields__)

    class LazyOutput(output_class, metaclass=_NoDataclass):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)  # which asks for its fields
            self.__dict__["_made"] = True

        def _read(self, name: Any) -> None:
            held = self.__dict__.get(name)
            if isinstance(held, Deferred):
                self[name] = held.value()

        def __getattribute__(self, name: str) -> Any:
            if name in names:
                self._read(name)
            elif name == _FIELDS and "_made" in self.__dict__:
                raise AttributeError(name)
            return super().__getattribute__(name)

        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, int):
                key = tuple(self)[key]
            if isinstance(key, str):
                self._read(key)
                return dict.__getitem__(self, key)
            return self.to_tuple()[key]

        def keys(self) -> Any:
            if not self.__dict__.get("_hides", False):
                return super().keys()
            return [key for key, held in self.items() if not isinstance(held, Deferred)]

        def to_tuple(self) -> tuple:
            return tuple(self[key] for key in tuple(self))

        def get(self, key: Any, default: Any = None) -> Any:
            self._read(key)
            return super().get(key, default)

        def __reduce__(self) -> Any:
            return output_class, tuple(getattr(self, name) for name in names)

    LazyOutput.__name__ = LazyOutput.__qualname__ = output_class.__name__
    LazyOutput.__module__ = output_class.__module__
    return LazyOutput
