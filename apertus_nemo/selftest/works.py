"""Whether an installation works: its packages can be imported, and a training step gives the same bits twice.

    imports, gpus = importing(["torch", "megatron.core"], environment, limit_s=600)
    training_step(folder, gpu=False)

Both happen in processes of their own: this one imports neither torch nor NeMo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from apertus_nemo.errors import Differs, InputError, UnfitEnvironment
from apertus_nemo.launch.local import train
from apertus_nemo.launch.show import Display
from apertus_nemo.recipe.compose import compose
from apertus_nemo.record.step_log import StepRecord, read_steps
from apertus_nemo.selftest.check import FAILED, OK, Check, verdict

# A step of two micro-batches, the last of its run: so the digest of all parameters and optimizer states is logged.
STEP = (
    "recipe=tiny_pretrain",
    "model.num_layers=2",
    "data.seq_length=64",
    "data.tokenizer_vocab_size=512",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "trainer.max_steps=1",
    "schedule.warmup_samples=0",  # a step at the full learning rate
    "trainer.checkpoint_every_steps=0",
    "trainer.tensorboard=false",
)
_IMPORTING = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
gpus, why = 0, ""
try:
    import torch
    gpus = torch.cuda.device_count()
    why = "" if gpus else "no CUDA device" if torch.version.cuda else "torch is built without CUDA"
except BaseException as error:
    why = f"torch cannot be imported: {type(error).__name__}"
sys.stdout.write("\\n" + json.dumps({"failed": failed, "gpus": gpus, "why": why}) + "\\n")
"""


def importing(
    modules: Sequence[str], environment: Mapping[str, str], *, limit_s: float
) -> tuple[Check | None, int, str]:
    """(the check, None without modules; number of CUDA devices; why there are none)."""
    failed, gpus, why = None, 0, "the modules could not be imported"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-s", "-c", _IMPORTING, *modules],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
        failed, gpus, why = answer["failed"], answer["gpus"], answer["why"]
    except subprocess.TimeoutExpired:
        text = f"not done after {limit_s:.0f} s"
    except (ValueError, IndexError, KeyError, TypeError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
        text = f"Python ended with {done.returncode}: {last[0][:300]}"
    if not modules:
        return None, gpus, why
    if failed is None:
        return Check("imports", FAILED, text), gpus, why
    faults = [f"{name}: {text[:300]}" for name, text in sorted(failed.items())]
    return verdict("imports", faults, ", ".join(modules)), gpus, why


def training_step(folder: Path, *, gpu: bool) -> Check:
    """One step of a tiny model, through the launcher and NeMo, twice from nothing: loss, gradient norm, state digest.

    Raises UnfitEnvironment where `folder` cannot hold it.
    """
    resolved = compose(overrides=[*STEP, "trainer=gpu" if gpu else "trainer=cpu"])
    logged: list[list[StepRecord]] = []
    for number in (1, 2):
        directory = folder / f"run-{number}"
        try:
            train(resolved, directory, cache=folder / "cache", display=Display(quiet=True), allow_dirty=True)
        except (Differs, InputError, UnfitEnvironment) as error:
            if isinstance(error, UnfitEnvironment) and not (directory / "attempts").exists():
                raise
            return Check("training step", FAILED, str(error).splitlines()[0])
        logged.append(list(read_steps(directory / "steps")))
    return same_step(*logged)


def same_step(first: Sequence[StepRecord], second: Sequence[StepRecord]) -> Check:
    """The two logs of one step, value by value."""
    name = "training step"
    last = first[-1] if first else StepRecord(0)
    if last.loss is None or last.grad_norm is None or last.state_digest is None:
        return Check(name, FAILED, "the log does not hold loss, gradient norm and state digest of the step")
    names = ("batch_digest", "loss", "grad_norm", "state_digest")
    pairs = [
        (f"step {one.step}: {field}", getattr(one, field), getattr(other, field))
        for one, other in zip(first, second, strict=False)
        for field in names
    ]
    faults = [f"{field} is {one}, then {other}" for field, one, other in pairs if one != other]
    if len(first) != len(second):
        faults.append(f"{len(first)} lines are logged, then {len(second)}")
    if faults:
        return verdict(name, [f"the same step twice, and {faults[0]}", *faults[1:]], "")
    values = f"loss {last.loss:.6f}, gradient norm {last.grad_norm:.6f}, state digest {last.state_digest[:12]}"
    return Check(name, OK, f"twice {values}")
