"""Device aliasing: on a host without CUDA, the device "cuda" is the CPU.

NeMo and Megatron-core name the device "cuda" in many places and never ask for another one. `alias_cuda()`
makes those names mean the CPU, for the whole process, by replacing a short list of functions:

- functions that create tensors, and `Tensor.to`, take device="cuda..." for the CPU and drop `pin_memory`;
- `Tensor.cuda()` returns the tensor; `Tensor.type()` answers with the CUDA name, since Megatron compares
  those names in gradient clipping and in the distributed optimizer;
- `torch.cuda`'s streams, events, generators and counters get CPU counterparts that keep order, which on a
  CPU is all they have to do;
- Megatron's RNG tracker works on the CPU's generator.

With a GPU nothing is called and nothing changes. A function is replaced rather than a `TorchFunctionMode`
entered: a mode costs about a microsecond in every torch call of the process, these replacements cost
it only in the calls that name a device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Functions of the torch namespace that upstream calls with a device.
_CREATORS = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace"),
    *("normal", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
    *("scalar_tensor", "tensor", "zeros", "zeros_like"),
)

_target = torch.device("cpu")  # what "cuda" means
_installed = False
_originals: list[tuple[Any, str, Any]] = []


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _creator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _target
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return create


def _to(original: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = (_target, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _target
        return original(self, *args, **kwargs)

    return to


def _type(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, *args, **kwargs)

    return type_


class _Stream:
    """The one order in which a CPU does things."""

    cuda_stream = 0
    device = _target

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    """A point in that order; always reached."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _Properties:
    """What Megatron asks of a device: its compute capability (none)."""

    name = "cpu"
    major = 0
    minor = 0
    multi_processor_count = 1
    total_memory = 0


@contextlib.contextmanager
def _stream(_: Any) -> Iterator[None]:
    yield


class _Quiet(logging.Filter):
    """Drops one warning that aliasing makes unavoidable: the "GPU" generator *is* the CPU's."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


_QUIET = _Quiet()


def alias_cuda(*, ranks: int = 1) -> None:
    """Make "cuda" mean the CPU in this process; `ranks` is the number of devices to announce.

    Does nothing where CUDA works, or when called again. Must run before NeMo builds its trainer.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # `with torch.device("meta")` looks for torch's own functions in a set that torch fills on first use
    torch.utils._device._device_constructors()
    for name in _CREATORS:
        _replace(torch, name, _creator(getattr(torch, name)))
    _replace(torch.Tensor, "to", _to(torch.Tensor.to))
    _replace(torch.Tensor, "type", _type(torch.Tensor.type))
    _replace(torch.Tensor, "cuda", lambda self, *_, **__: self)
    _replace(torch.Tensor, "pin_memory", lambda self, *_, **__: self)
    _replace(torch.nn.Module, "cuda", lambda self, *_, **__: self)
    cuda: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "stream": _stream,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "current_device": lambda: _target,
        "device_count": lambda: ranks,
        "get_device_properties": lambda *_: _Properties(),
        "get_device_capability": lambda *_: (0, 0),
        "get_device_name": lambda *_: "cpu",
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "ByteTensor": torch.ByteTensor,
    }
    # torch refuses one function under two names, so each name gets its own
    for name in (
        "manual_seed_all",
        "synchronize",
        "set_device",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
    ):
        cuda[name] = lambda *_, **__: None
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        cuda[name] = lambda *_, **__: 0
    for name, value in cuda.items():
        _replace(torch.cuda, name, value)
    _alias_megatron_random()


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within, aliased "cuda" means the meta device: Megatron's buffers have shapes, and hold nothing."""
    global _target
    before, _target = _target, torch.device("meta")
    try:
        yield
    finally:
        _target = before


def _alias_megatron_random() -> None:
    """Let Megatron's RNG tracker read and write the CPU's generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    _replace(megatron_random, "_get_cuda_rng_state", get_state)
    _replace(megatron_random, "_set_cuda_rng_state", set_state)
    logging.getLogger(megatron_random.__name__).addFilter(_QUIET)


def restore() -> None:
    """Undo `alias_cuda`; for measurements that compare against a path without it."""
    global _installed
    while _originals:
        owner, name, value = _originals.pop()
        setattr(owner, name, value)
    logging.getLogger("megatron.core.tensor_parallel.random").removeFilter(_QUIET)
    _installed = False
