"""The table of what later attempts may find: each row by its kind, and nothing without a row."""

from __future__ import annotations

import pytest

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.record.observed import (
    EQUAL,
    EQUAL_IF_BITWISE,
    EQUAL_IF_NATIVE,
    RECORDED,
    TABLE,
    compare_observed,
    refuse_other_machine,
)

FIRST = dict.fromkeys([*TABLE, "of_tomorrow"], "one")


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("level", ["bitwise", "relaxed"])
@pytest.mark.parametrize("instruction_set", ["native", "avx2"])
def test_each_field_alone(name: str, level: str, instruction_set: str) -> None:
    kind = TABLE[name].kind if name in TABLE else EQUAL
    may_differ = {
        EQUAL: False,
        RECORDED: True,
        EQUAL_IF_NATIVE: instruction_set == "avx2",
        EQUAL_IF_BITWISE: level == "relaxed",
    }[kind]
    for now in ({**FIRST, name: "two"}, {key: value for key, value in FIRST.items() if key != name}):
        (finding,) = compare_observed(FIRST, now, level=level, instruction_set=instruction_set)
        assert (finding.field, finding.first, finding.refused) == (name, "one", not may_differ)
        assert finding.reason
        if may_differ:
            refuse_other_machine(FIRST, now, level=level, instruction_set=instruction_set)
            continue
        with pytest.raises(UnfitEnvironment) as refusal:
            refuse_other_machine(FIRST, now, level=level, instruction_set=instruction_set)
        assert str(refusal.value).splitlines()[0] == "this machine is not as the run found it:"
        assert (
            f'observed.{name}: first "one", now {chr(34) + "two" + chr(34) if name in now else "absent"}; must be'
            in str(refusal.value)
        )
        for allowed in (f"observed.{name}", "observed"):
            refuse_other_machine(FIRST, now, level=level, instruction_set=instruction_set, allowed=[allowed])
        with pytest.raises(UnfitEnvironment):
            refuse_other_machine(FIRST, now, level=level, instruction_set=instruction_set, allowed=["observed.x"])


def test_the_same_is_the_same() -> None:
    assert compare_observed(FIRST, dict(FIRST), level="bitwise", instruction_set="native") == []
    assert compare_observed({"a": 1}, {"a": True}, level="bitwise", instruction_set="native") != []
    assert compare_observed({"a": None}, {}, level="bitwise", instruction_set="native") != []


def test_every_row_has_its_reason() -> None:
    assert list(TABLE) == sorted(TABLE)
    assert all(rule.reason for rule in TABLE.values())
