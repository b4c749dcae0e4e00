"""Records that were written once: they verify, mean the same, and are still written with these bytes.

`run-v1` is frozen. It is read here by our reader and by a few lines that know nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from apertus_nemo.audit.compare import compare
from apertus_nemo.audit.report import text
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.step_log import read_steps
from tests.golden.update import golden_state, write_run
from tests.unit.record.example import lock, step

HERE = Path(__file__).parent
RUN = HERE / "run-v1"
LOCK_DIGEST = "5be4535074713c06e052a11e1b1cae9a051edcb32063aab09d6bd7d24d575f2d"
LAST_LINE = "c86fb1279807ddb62685e88ce105aaa3aba7fbaeb70ad2c5d6b70c08036e660f"
STATE_DIGEST = "7d1ad6809b609fdf90e3d570d13e5de068765a79a98e47a89c2dfac03fdb0e17"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plain_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_the_frozen_run_verifies_with_hashlib_and_json_alone() -> None:
    assert sha256((RUN / "lock.json").read_bytes()) == LOCK_DIGEST
    lines = (RUN / "steps" / "000000.jsonl").read_bytes().splitlines()
    assert json.loads(lines[0])["lock_digest"] == LOCK_DIGEST
    for before, line in zip(lines, lines[1:], strict=False):  # noqa: RUF007
        assert json.loads(line)["previous"] == sha256(before)
        assert plain_json(json.loads(line)) == line
    assert sha256(lines[-1]) == LAST_LINE
    state = json.loads((RUN / "states" / "step-000000012.json").read_bytes())
    assert sha256(plain_json(state["tensors"])) == state["digest"] == STATE_DIGEST
    assert json.loads(lines[-1])["state_digest"] == STATE_DIGEST


def test_the_frozen_run_is_read_as_what_it_was() -> None:
    assert RunLock.from_bytes((RUN / "lock.json").read_bytes(), what="it").digest == LOCK_DIGEST
    initial, *records = read_steps(RUN / "steps")
    assert initial.state_digest == golden_state(0).digest
    assert records[:-1] == [step(number) for number in range(1, 12)]
    assert records[-1].state_digest == STATE_DIGEST == golden_state(12).digest
    assert text(compare(RUN, RUN)).startswith("identical, 12 of 12 steps, 6 of 6 tensors\n")


def test_the_frozen_recipe_is_still_one() -> None:
    """A key that came later is one that a recorded recipe may leave out (`schema.OPTIONAL`)."""
    frozen = RunLock.from_bytes((RUN / "lock.json").read_bytes(), what="it")
    assert from_tree(frozen.tree["config"]).name == "tiny_pretrain"


def test_the_same_run_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    frozen = RunLock.from_bytes((RUN / "lock.json").read_bytes(), what="it")
    write_run(tmp_path / "again", frozen)
    for path in sorted(RUN.rglob("*")):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(RUN)).read_bytes() == path.read_bytes(), path.name


def test_the_lock_of_today() -> None:
    """A difference here is a change of every lock digest: on purpose only (`python -m tests.golden.update`)."""
    assert lock().to_bytes() == (HERE / "lock.json").read_bytes()
