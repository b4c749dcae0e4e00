"""Nothing that a checkpoint holds is called but what torch's and Megatron's writers name."""

from __future__ import annotations

from pathlib import Path

from apertus_nemo.testing.ranks import Parent


def test_metadata_that_would_call_something(parent: Parent, tmp_path: Path) -> None:
    (answers,) = parent.run("tests.cases.unpickle:refused", arguments={"folder": str(tmp_path)})
    assert answers["system"] == " names posix.system, which no checkpoint needs: it is not opened"
    assert answers["eval"] == " names builtins.eval, which no checkpoint needs: it is not opened"
    assert answers["torch.load"] == " names torch.serialization.load, which no checkpoint needs: it is not opened"
    for name in ("nested name", "dotted", "cut", "empty"):
        assert answers[name] != "taken"
    assert answers["dtypes"] == "taken"
    assert answers["made"] == "False"


def test_torch_is_held_to_its_own_list(parent: Parent, tmp_path: Path) -> None:
    (answer,) = parent.run("tests.cases.unpickle:load_forced", arguments={"folder": str(tmp_path)})
    assert answer == ["refused", "None"]
