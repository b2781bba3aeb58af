"""Validated artifacts as JUnit XML, which CI systems show: a suite for each artifact, a case for each gate."""

import re
from collections.abc import Sequence
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from .judged import Judged
from .record import Gate, Record

UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not have; the last words of a crashed runtime may hold some."""


def write(artifacts: Sequence[Judged], path: Path) -> None:
    """One file for all of them."""
    xml = JUnitXml("artifacts")
    for one in artifacts:
        xml.append(suite(one))
    xml.update_statistics()
    xml.write(str(path), pretty=True)


def suite(one: Judged) -> TestSuite:
    """One artifact: its gates; what ended its run is a case too, where no gate says it."""
    made = TestSuite(one.name)
    if one.record is None:
        made.add_testcase(case(one.name, "validated", Error(printable(one.problem))))
        return made
    for name, value in facts(one.record).items():
        made.add_property(name, value)
    for gate in one.record.gates:
        made.add_testcase(case(one.name, gate.name, verdict(gate)))
    if not one.holds and all(gate.verdict != "fail" for gate in one.record.gates):
        made.add_testcase(case(one.name, "run", Error(printable(one.record.detail), one.record.outcome.value)))
    return made


def facts(record: Record) -> dict[str, str]:
    """What the results belong to."""
    machine = record.environment
    found = {"device": record.device, "cpu": machine.cpu, "commit": record.commit, "run_id": record.run_id}
    return {name: printable(value) for name, value in found.items()}


def case(artifact: str, name: str, result: Error | Failure | Skipped | None) -> TestCase:
    """One gate; no result: it holds."""
    made = TestCase(name, classname=artifact)
    if result is not None:
        made.result = [result]
    return made


def verdict(gate: Gate) -> Failure | Skipped | None:
    """Value and limit of a gate that fails; one that noise left open counts as skipped."""
    if gate.verdict == "pass":
        return None
    found = f"{gate.value:.6g}, must be {gate.rule} {gate.limit:.6g}"
    message = printable(f"{found}: {gate.detail}" if gate.detail else found)
    return Failure(message, gate.fails_as.value) if gate.verdict == "fail" else Skipped(message, gate.verdict)


def printable(text: str) -> str:
    """What XML can hold."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
