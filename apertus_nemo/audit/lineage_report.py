"""A lineage in words, and as JSON."""

from __future__ import annotations

from typing import Any

from apertus_nemo.audit.lineage import BEGINNING, CONTRADICTED, NOT_FOUND, NOT_OURS, TOO_LONG, Lineage, Link, Member
from apertus_nemo.audit.lineage_checks import DIFFERENT, EQUAL, NOT_CHECKED
from apertus_nemo.record.initial import RUN
from apertus_nemo.record.places import printable

FORMAT = 1  # of the JSON

_HEADLINES = {
    BEGINNING: "back to its beginning",
    NOT_FOUND: "not further: a run was not found",
    NOT_OURS: "not further: the weights are from a folder that was not exported from a run of ours",
    TOO_LONG: "not further: the chain is too long",
    CONTRADICTED: "contradicted",
}


def text(chain: Lineage) -> str:
    """Lines for people: how far the chain goes, each member with its link, and why it ends there."""
    count = len(chain.links)
    lines = [f"{_HEADLINES.get(chain.end, 'not further: a record does not say')}, {count} link{'s' * (count != 1)}"]
    for number, member in enumerate(chain.members):
        lines.append(f"  {_member(member)}")
        if number < count:
            lines += [f"    {line}" for line in _link(chain.links[number])]
    lines.append(f"  end: {chain.reason}")
    return "\n".join(printable(line) for line in lines)


def _member(member: Member) -> str:
    if member.lock_digest is None:
        return f"{member.path}, a folder"
    return f"{member.path}, {member.name}, lock digest {member.lock_digest}"


def _link(link: Link) -> list[str]:
    how = "read from its checkpoint" if link.through == RUN else "from a folder that was exported from it"
    found = "not found" if link.found is None else f"found: {link.found}"
    what = "adapters" if link.origin.merged else "weights"
    lines = [f"{what} after step {link.origin.step} of the run {link.origin.lock_digest}, {how}; {found}"]
    equal = [check.what for check in link.checks if check.result == EQUAL]
    if equal:
        lines.append(f"equal: {'; '.join(equal)}")
    for result in (DIFFERENT, NOT_CHECKED):
        lines += [f"{result}: {check.what}: {check.reason}" for check in link.checks if check.result == result]
    lines += [f"passed over: {path}: {check.what}: {check.reason}" for path, check in link.passed_over]
    return lines


def tree(chain: Lineage) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "end": chain.end,
        "exit_code": chain.exit_code,
        "format": FORMAT,
        "links": [
            {
                "checks": [
                    {"reason": check.reason or None, "result": check.result, "what": check.what}
                    for check in link.checks
                ],
                "found": link.found,
                "lock_digest": link.origin.lock_digest,
                "passed_over": [
                    {"path": str(path), "reason": check.reason, "what": check.what} for path, check in link.passed_over
                ],
                "step": link.origin.step,
                "through": link.through,
                "weights_digest": link.origin.weights_digest,
            }
            for link in chain.links
        ],
        "members": [
            {
                "kind": "folder" if member.lock_digest is None else "run",
                "lock_digest": member.lock_digest,
                "name": member.name,
                "path": str(member.path),
            }
            for member in chain.members
        ],
        "reason": chain.reason,
    }
