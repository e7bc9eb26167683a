"""`--junit`: a test suite per bundle, a test per case and kind of output, one for each loss that was measured, one for
the baseline. A run without a verdict is an <error>, also where this machine could not check (exit 3): a skipped test
would be read as green. For the same reason a loss that was not measured is a property, not a test."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ..compare.case_verdict import CaseVerdict, KindVerdict
from ..compare.verdict import Verdict
from .baseline import key_of
from .console import parts_lines
from .long_report import tests as long_tests
from .outcome import Outcome, environment

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""characters that XML 1.0 cannot hold, not even escaped"""


def text(outcome: Outcome) -> str:
    """The XML document."""
    root = Element("testsuites", name="gqa-export validate")
    for verdict in outcome.verdicts:
        root.append(_suite(verdict, outcome))
    if outcome.problem is not None:
        suite = SubElement(root, "testsuite", name=_clean(f"gqa-export validate {', '.join(outcome.bundles)}"))
        test = SubElement(suite, "testcase", classname="gqa_export.validate", name="verdict", time="0")
        SubElement(test, "error", type=type(outcome.problem).__name__,
                   message=_clean(outcome.problem.what)).text = _clean(str(outcome.problem))
    for suite in root:
        _count(suite)
    _count(root)
    root.set("time", f"{sum(float(suite.get('time', 0)) for suite in root):.3f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(verdict: Verdict, outcome: Outcome) -> Element:
    suite = Element("testsuite", name=_clean(f"gqa-export validate {Path(verdict.bundle).name}"))
    suite.set("time", f"{verdict.seconds:.3f}")
    properties = SubElement(suite, "properties")
    facts = {"against": verdict.against, "target": verdict.target, "dtype": verdict.dtype, "provider": verdict.provider,
             "checked_dtype": verdict.checked_dtype, "reference_dtype": verdict.reference_dtype, "cache": verdict.cache,
             "capacity": verdict.capacity, "compared": ", ".join(verdict.compared),
             "loss": verdict.loss_label,
             **({"long prompts": verdict.long_label} if verdict.approximated else {}),
             **dict(line.split(": ", 1) for line in parts_lines(verdict)),
             **verdict.versions, **environment()}
    for name, value in facts.items():
        SubElement(properties, "property", name=name, value=_clean(str(value)))
    for case in verdict.cases:
        for kind in case.kinds:
            _test(suite, case, kind)
    if verdict.loss is not None:
        test = SubElement(suite, "testcase", classname="gqa_export.validate.loss", name="loss", time="0")
        if not verdict.loss.passed:
            SubElement(test, "failure", type="loss", message=_clean(verdict.loss.failure)).text = _clean(
                verdict.loss_label)
    for group, name, each, failure in long_tests(verdict.long) if verdict.long is not None else ():
        test = SubElement(suite, "testcase", classname=f"gqa_export.validate.{group}", name=name,
                          time=f"{each.seconds:.3f}")
        if failure:
            SubElement(test, "failure", type="loss", message=_clean(failure)).text = _clean(verdict.long_label)
    drifts = [drift for drift in outcome.drifts if drift.bundle == key_of(verdict)]
    for drift in drifts:
        test = SubElement(suite, "testcase", classname=f"gqa_export.baseline.{drift.case}", name="drift", time="0")
        SubElement(test, "failure", type="drift", message=_clean(drift.message))
    SubElement(suite, "system-out").text = _clean("\n".join(verdict.notes))
    return suite


def _test(suite: Element, case: CaseVerdict, kind: KindVerdict) -> None:
    alone = sum(each.kind == kind.kind for each in case.kinds) == 1
    test = SubElement(suite, "testcase", classname=f"gqa_export.validate.{case.name}",
                      name=_clean(kind.kind if alone else f"{kind.kind}: {kind.output}"),
                      time=f"{case.seconds / len(case.kinds):.3f}")
    wrong = str(kind.first) if kind.first is not None else ""
    if kind.kind == "logits" and case.parted is not None:
        wrong = wrong or case.wrong_token
    if wrong:
        SubElement(test, "failure", type="difference", message=_clean(wrong)).text = _clean(case.purpose)


def _count(element: Element) -> None:
    tests = list(element.iter("testcase"))
    element.set("tests", str(len(tests)))
    element.set("failures", str(sum(test.find("failure") is not None for test in tests)))
    element.set("errors", str(sum(test.find("error") is not None for test in tests)))
    if element.tag == "testsuite":
        element.set("skipped", "0")


def _clean(value: str) -> str:
    return NOT_XML.sub("\ufffd", value)
