"""What `alias_cuda` does to a process; each case runs in a fork of its own and returns what it saw."""

from __future__ import annotations

from typing import Any


def created(rank: int, world_size: int, *, device: str) -> dict[str, list[Any]]:
    """function -> [device, values] of every creation function of torch that is aliased, called with `device`."""
    import torch

    from apertus_nemo.training.device import _CREATORS, alias_cuda

    alias_cuda()
    base = torch.arange(6.0).reshape(2, 3)
    arguments: dict[str, tuple[Any, ...]] = {
        "arange": (5,),
        "as_tensor": ([1, 2],),
        "asarray": ([1, 2],),
        "empty": (2, 3),
        "empty_like": (base,),
        "empty_strided": ((2, 3), (3, 1)),
        "eye": (3,),
        "full": ((2, 3), 7.0),
        "full_like": (base, 7.0),
        "linspace": (0, 1, 5),
        "normal": (0.0, 1.0, (2, 3)),
        "ones": (2, 3),
        "ones_like": (base,),
        "rand": (2, 3),
        "rand_like": (base,),
        "randint": (0, 9, (2, 3)),
        "randint_like": (base, 9),
        "randn": (2, 3),
        "randn_like": (base,),
        "randperm": (5,),
        "scalar_tensor": (3.0,),
        "tensor": ([1, 2],),
        "zeros": (2, 3),
        "zeros_like": (base,),
    }
    found = {}
    for name in _CREATORS:
        torch.manual_seed(1)
        tensor = getattr(torch, name)(*arguments[name], device=device)
        found[name] = [str(tensor.device), None if name.startswith("empty") else tensor.tolist()]
    return found


def moved(rank: int, world_size: int) -> dict[str, Any]:
    """Every way of moving a tensor or a module to "cuda"."""
    import torch

    from apertus_nemo.training.device import alias_cuda

    alias_cuda()
    tensor = torch.arange(3.0)
    cuda = torch.device("cuda", 0)
    results = {
        "to text": tensor.to("cuda"),
        "to index": tensor.to("cuda:0"),
        "to device": tensor.to(cuda),
        "to keyword": tensor.to(device="cuda", dtype=torch.float64),
        "to device and dtype": tensor.to(cuda, torch.float64, non_blocking=True),
        "to dtype": tensor.to(torch.float16),
        "to other": tensor.to(torch.zeros(1, dtype=torch.int32)),
        "cuda": tensor.cuda(),
        "cuda index": tensor.cuda(0, non_blocking=True),
        "pin": tensor.pin_memory(),
        "pinned": torch.zeros(3, pin_memory=True),
        "parameter": torch.nn.Parameter(tensor).cuda(),
        "module cuda": torch.nn.Linear(2, 2).cuda().weight,
        "module to": torch.nn.Linear(2, 2).to("cuda").weight,
        "module to device": torch.nn.Linear(2, 2).to(device=cuda, dtype=torch.bfloat16).weight,
        "type": tensor.type("torch.cuda.HalfTensor"),
        "type of a dtype": tensor.type(torch.float64),
        "constructor": torch.cuda.FloatTensor([1.0, 2.0]),
    }
    return {
        "where": {name: [str(value.device), str(value.dtype)] for name, value in results.items()},
        "same object": tensor.cuda() is tensor and tensor.to("cuda") is tensor,
        "type names": [tensor.type(), tensor.bfloat16().type(), tensor.half().type(), tensor.long().type()],
        "cpu stays": str(tensor.to("cpu").device),
        "meta stays": str(tensor.to("meta").device),
        "available": torch.cuda.is_available(),
    }


def ordered(rank: int, world_size: int) -> dict[str, Any]:
    """Streams, events and counters, used as Megatron and NeMo use them."""
    import torch

    from apertus_nemo.training.device import alias_cuda

    alias_cuda(ranks=3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor = torch.ones(2, device="cuda")
    event = side.record_event()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record(side)
    event.wait()
    end.synchronize()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.default_stream().synchronize()
    torch.cuda.synchronize()
    torch.cuda.set_device(2)
    torch.cuda.empty_cache()
    return {
        "values": tensor.tolist(),
        "done": [event.query(), side.query(), start.elapsed_time(end)],
        "devices": torch.cuda.device_count(),
        "current": str(torch.cuda.current_device()),
        "memory": [torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()],
        "properties": torch.cuda.get_device_properties(0).major,
    }


def random_states(rank: int, world_size: int) -> dict[str, Any]:
    """torch.cuda's generator and Megatron's tracker of named states."""
    import torch
    from megatron.core.tensor_parallel import random as megatron_random

    from apertus_nemo.training.device import alias_cuda

    alias_cuda()
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3).tolist()
    torch.cuda.set_rng_state(state)
    again = torch.rand(3).tolist()
    torch.manual_seed(5)
    cpu = torch.rand(3).tolist()

    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(7)
    tracker.add("expert", 11)
    outside = torch.get_rng_state()
    with tracker.fork("expert"):
        inside = torch.rand(3).tolist()
    kept = bool(torch.equal(outside, torch.get_rng_state()))
    with tracker.fork("expert"):
        later = torch.rand(3).tolist()
    torch.manual_seed(11)
    expected = torch.rand(6).tolist()
    return {"first": first, "again": again, "cpu": cpu, "kept": kept, "forked": inside + later, "expected": expected}


def meta(rank: int, world_size: int) -> list[str]:
    """A device context still decides where nobody names a device."""
    import torch

    from apertus_nemo.training.device import alias_cuda

    alias_cuda()
    with torch.device("meta"):
        return [str(torch.empty(2).device), str(torch.ones(2).device), str(torch.nn.Linear(2, 2).weight.device)]


def put_back(rank: int, world_size: int) -> dict[str, Any]:
    """Names that differ from before: while aliased, after `restore`, and once more after a second round."""
    import logging

    import torch
    from megatron.core.tensor_parallel import random as megatron_random

    from apertus_nemo.training.device import alias_cuda, restore

    owners = [torch, torch.Tensor, torch.nn.Module, torch.cuda, megatron_random]
    logger = logging.getLogger(megatron_random.__name__)

    def look() -> dict[str, Any]:
        found = {f"{owner.__name__}.{name}": getattr(owner, name, None) for owner in owners for name in dir(owner)}
        return {name: value for name, value in found.items() if callable(value)} | {"filters": list(logger.filters)}

    torch.utils._device._device_constructors()
    before = look()

    def changed() -> list[str]:
        now = look()
        return sorted(
            name
            for name in before.keys() | now.keys()
            if name not in before or name not in now or not (before[name] is now[name] or before[name] == now[name])
        )

    alias_cuda()
    once = changed()
    alias_cuda()
    twice = changed()
    restore()
    after = changed()
    alias_cuda()
    restore()
    try:
        torch.zeros(1, device="cuda")
        refuses = False
    except (RuntimeError, AssertionError):
        refuses = True
    return {"once": once, "twice": twice, "after": after, "second round": changed(), "refuses": refuses}
