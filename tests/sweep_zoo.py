"""Every entrypoint of timm: relevance proved where vitviz supports it, a reason where it does not.

It takes minutes, so it is not collected by itself: ``make zoo``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import timm

from vitviz.errors import UnsupportedModelError
from vitviz.models.building import build_skeleton
from vitviz.models.catalogue import Support, survey_models
from vitviz.models.preprocessing import preprocessing_of
from vitviz.models.tokens import Readout, read_layout
from zoo import (
    SETTINGS,
    assert_layout_is_measured,
    assert_readout_is_measured,
    assert_relevance_equals_reference,
    assert_telling,
    collect,
)

NAMES = timm.list_models()
EXPECTED = {"1.0.31": {"plain": 280, "attention-pooled": 27, "class attention": 10}}

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Tally:
    """What became of the entrypoints.

    Attributes:
        refused: Those that vitviz does not support.
        supported: The others, by kind.
        proved: Those of them that were compared with the reference.
        errors: Their largest errors, by setting.
    """

    refused: list[str] = field(default_factory=list)
    supported: dict[str, list[str]] = field(default_factory=dict)
    proved: list[str] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def visited(self) -> int:
        return len(self.refused) + sum(map(len, self.supported.values()))

    def __str__(self) -> str:
        kinds = ", ".join(f"{len(names)} {kind}" for kind, names in self.supported.items())
        lines = [
            f"timm {timm.__version__}: {self.visited} of {len(NAMES)} entrypoints: "
            f"{len(self.refused)} refused; supported: {kinds or 'none'}; "
            f"{len(self.proved)} proved"
        ]
        for setting in map(str, SETTINGS):
            errors = {name: each[setting] for name, each in self.errors.items() if setting in each}
            if errors:
                worst = max(errors, key=errors.__getitem__)
                lines.append(f"{setting}: at most {errors[worst]:.1e} ({worst}) in {len(errors)}")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Support]]:
    """What `vitviz models` says, as it is shipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield dict(survey_models(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_entrypoint_is_proved_or_refused(
    name: str, tally: Tally, census: dict[str, Support]
) -> None:
    whole = build_skeleton(name)
    try:
        layout = read_layout(whole, preprocessing_of(whole).size)
    except UnsupportedModelError as error:
        assert "\n" not in str(error)
        assert (census[name].rollout, census[name].reason) == (False, str(error))
        tally.refused.append(name)
        return
    kinds = {
        Readout.ATTENTION_POOLING: "attention-pooled",
        Readout.CLASS_ATTENTION: "class attention",
    }
    tally.supported.setdefault(kinds.get(layout.readout, "plain"), []).append(name)
    assert census[name].rollout
    assert census[name].grad_rollout == bool(whole.num_classes)
    assert census[name].readout == layout.readout.value
    assert (census[name].prefix, census[name].grid) == (layout.described_prefix(), layout.grid)
    specimen = collect(name)
    found = specimen.loaded.layout
    assert (found.described_prefix(), found.readout) == (layout.described_prefix(), layout.readout)
    assert (found.tail, found.pooled_from > 0) == (layout.tail, layout.pooled_from > 0)
    assert_telling(specimen)
    assert_layout_is_measured(specimen)
    assert_readout_is_measured(specimen)
    assert_relevance_equals_reference(specimen)
    tally.errors[name] = specimen.errors
    tally.proved.append(name)


def test_every_supported_entrypoint_was_proved(
    tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n{tally}")
    if tally.visited != len(NAMES):
        pytest.skip("only some of the entrypoints were asked for")
    assert sorted(tally.proved) == sorted(sum(tally.supported.values(), []))
    expected = EXPECTED.get(timm.__version__)
    if expected:
        assert {kind: len(names) for kind, names in tally.supported.items()} == expected
