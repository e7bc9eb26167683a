"""A pytest plugin: `pytest --gqa-bundle DIR --gqa-against CHECKPOINT` compares bundles with PyTorch as tests.

Every bundle gives one test per kind of output (keys, values, logits, cache), one that its best tokens agree, one that
it refuses what it must, and one for the baseline if there is one; all carry the marker `gqa`. The comparison runs once
per bundle, when the first of its tests does. What cannot be checked on this machine fails: a skipped test would be
read as green. A test that has nothing to compare in this model is skipped, with the reason. The fixture `gqa_verdicts`
gives the verdicts to tests of your own. Loaded in every pytest run where gqa-export is installed, so it imports
nothing heavy until it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..errors import GqaExportError

if TYPE_CHECKING:
    from ..compare.verdict import Verdict

KINDS = ("keys", "values", "logits", "cache")
TOKENS, REST, DRIFT = "best_tokens", "refusals", "baseline"
NOTHING = dict.fromkeys(("keys", "values", "cache"),
                        "PyTorch's own cache does not hold the keys and values of any layer of this model")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("gqa-export", "bundles compared with PyTorch (gqa-export)")
    group.addoption("--gqa-bundle", action="append", default=[], metavar="DIR", help="A bundle to check; repeatable.")
    group.addoption("--gqa-against", metavar="CHECKPOINT", help="Folder, hub id or GGUF file they were made from.")
    group.addoption("--gqa-steps", type=int, default=32, metavar="N", help="Decode steps of each case (default 32).")
    group.addoption("--gqa-provider", default="auto", choices=["auto", "cpu", "cuda"],
                    help="Where ONNX Runtime runs the bundles.")
    group.addoption("--gqa-as", choices=["fp32"], help="Check the fp32 twins of bf16 or fp16 bundles.")
    group.addoption("--gqa-baseline", metavar="FILE", help="Fail too where the errors are clearly above those in it.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; refuse options that make no sense together."""
    config.addinivalue_line("markers", "gqa: compares a bundle with PyTorch (gqa-export)")
    bundles, against = config.getoption("--gqa-bundle"), config.getoption("--gqa-against")
    if bool(bundles) != bool(against):
        raise pytest.UsageError("--gqa-bundle DIR and --gqa-against CHECKPOINT belong together")
    if config.getoption("--gqa-baseline") and not bundles:
        raise pytest.UsageError("--gqa-baseline needs --gqa-bundle and --gqa-against")
    config.stash[VERDICTS] = {}


VERDICTS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
"""bundle folder -> its verdict, or the GqaExportError that took its place"""


def verdict_of(config: pytest.Config, bundle: str) -> Verdict:
    """The verdict on a bundle, computed once per run. Raises GqaExportError, the same each time."""
    known = config.stash[VERDICTS]
    if bundle not in known:
        from ..validation.validate import validate

        try:
            known[bundle] = validate(bundle, config.getoption("--gqa-against"), steps=config.getoption("--gqa-steps"),
                                     provider=config.getoption("--gqa-provider"), as_dtype=config.getoption("--gqa-as"))
        except GqaExportError as error:
            known[bundle] = error
    if isinstance(known[bundle], GqaExportError):
        raise known[bundle]
    return known[bundle]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests of every bundle, before -k and -m look at the list."""
    checks = (*KINDS, TOKENS, REST, *([DRIFT] if config.getoption("--gqa-baseline") else []))
    for folder in config.getoption("--gqa-bundle"):
        for check in checks:
            items.append(BundleItem.from_parent(session, name=f"gqa[{Path(folder).name}-{check}]", folder=folder,
                                                check=check))


class BundleItem(pytest.Item):
    """One check of one bundle."""

    def __init__(self, *, folder: str, check: str, **rest: Any) -> None:
        super().__init__(**rest)
        self.folder, self.check = folder, check
        self.add_marker("gqa")
        self.add_marker(pytest.mark.xdist_group(f"gqa {folder}"))  # workers would each run the whole comparison

    def runtest(self) -> None:
        """Fail with what went wrong and where; skip where nothing of this kind was compared."""
        verdict = verdict_of(self.config, self.folder)
        wrong = list(self.failures(verdict))
        if wrong:
            raise Different("\n".join(wrong))
        if self.check != DRIFT and not self.measured(verdict):
            pytest.skip(f"{self.check}: nothing was compared ({', '.join(verdict.compared) or 'nothing'} was); "
                        f"{NOTHING.get(self.check, 'no case has it')}")

    def measured(self, verdict: Verdict) -> bool:
        """Whether the verdict holds anything of this check."""
        if self.check == TOKENS:
            return any(case.free and case.rows for case in verdict.cases)
        kinds = {kind.kind for case in verdict.cases for kind in case.kinds}
        return self.check in kinds if self.check in KINDS else bool(kinds - set(KINDS))

    def failures(self, verdict: Verdict) -> Iterator[str]:
        """What of this check did not hold, one line each."""
        if not verdict.cases:
            yield "no case was run"
        if self.check == DRIFT:
            from ..report.baseline import Baseline

            drifts, _ = Baseline.read(Path(self.config.getoption("--gqa-baseline"))).judge([verdict])
            yield from map(str, drifts)
        for case in verdict.cases:
            if self.check == TOKENS and case.parted is not None:
                yield case.wrong_token
            yield from (str(kind.first) for kind in case.kinds if kind.kind == self.check and kind.first is not None)
            if self.check == REST:
                yield from (str(kind.first) for kind in case.kinds if kind.kind not in KINDS and kind.first is not None)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The refusal or the differences, without a traceback."""
        if isinstance(excinfo.value, (Different, GqaExportError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where this test is: the bundle."""
        return Path(self.folder), None, self.name


class Different(AssertionError):
    """A bundle's outputs are not PyTorch's."""


@pytest.fixture(scope="session")
def gqa_verdicts(request: pytest.FixtureRequest) -> dict[str, Verdict]:
    """bundle folder -> its verdict, for every --gqa-bundle."""
    return {folder: verdict_of(request.config, folder) for folder in request.config.getoption("--gqa-bundle")}
