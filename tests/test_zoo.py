"""One member of every family of timm: supported ones are proved, the others refused with a reason.

All entrypoints, as wide as they are, are in sweep_zoo.py.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import timm

from fixtures_io import TIMM_IS_OLD
from vitviz.errors import UnsupportedModelError
from vitviz.explaining.batch import explain_batch
from vitviz.methods.features import Features
from vitviz.models.building import build_skeleton
from vitviz.models.model import load_model
from vitviz.models.preprocessing import preprocessing_of
from vitviz.models.tokens import Readout, read_layout
from zoo import (
    GRID,
    Specimen,
    assert_layout_is_measured,
    assert_readout_is_measured,
    assert_relevance_equals_reference,
    assert_telling,
    collect,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLASS, FIRST, BOTH, PATCHES, ALL, POOLED, JOINING = (
    Readout.CLASS_TOKEN,
    Readout.FIRST_TOKEN,
    Readout.CLASS_AND_DISTILLATION,
    Readout.PATCH_AVERAGE,
    Readout.TOKEN_AVERAGE,
    Readout.ATTENTION_POOLING,
    Readout.CLASS_ATTENTION,
)


@dataclass(frozen=True)
class Member:
    """A supported entrypoint and what is true of it, written down by hand.

    Attributes:
        name: The entrypoint.
        prefix: Its prefix tokens.
        readout: What its head reads.
        rows: Numbers of the tokens read: "0", "0-1", or from one of them to the end, as "5-".
    """

    name: str
    prefix: str
    readout: Readout
    rows: str

    def __str__(self) -> str:
        return self.name

    def reads(self, tokens: int) -> np.ndarray:
        first, to, last = self.rows.partition("-")
        end = tokens if to and not last else int(last or first) + 1
        reads = np.zeros(tokens, bool)
        reads[int(first) : end] = True
        return reads


MEMBERS = (
    # Absolute positions, and a class token that is read.
    Member("deit_tiny_patch16_224", "1 class", CLASS, "0"),
    Member("deit_tiny_distilled_patch16_224", "1 class + 1 distillation", BOTH, "0-1"),
    Member("deit3_small_patch16_224", "1 class", CLASS, "0"),
    Member("flexivit_small", "1 class", CLASS, "0"),
    Member("vit_base_patch32_clip_224", "1 class", CLASS, "0"),
    Member("vit_tiny_r_s16_p8_224", "1 class", CLASS, "0"),
    Member("vit_small_patch14_reg4_dinov2", "1 class + 4 registers", CLASS, "0"),
    Member("vit_base_patch14_reg1_tipsv2", "1 class + 1 register", CLASS, "0"),
    Member("vit_base_patch16_radio_v3", "1 class + 7 registers", CLASS, "0"),
    Member("vit_so400m_patch16_radio_v4", "1 class + 9 registers", CLASS, "0"),
    # Averages, with and without tokens that stay out of them.
    Member("beit3_base_patch16_224", "1 class", PATCHES, "1-"),
    Member("vit_little_patch16_reg1_gap_256", "1 register", PATCHES, "1-"),
    Member("vit_medium_patch16_reg4_gap_256", "4 registers", PATCHES, "4-"),
    Member("vit_medium_patch16_gap_240", "none", ALL, "0-"),
    Member("aimv2_large_patch14_224", "none", ALL, "0-"),
    Member("vitamin_small_224", "none", ALL, "0-"),
    # Attention pooling.
    Member("vit_base_patch16_siglip_224", "none", POOLED, "0-"),
    Member("vit_so150m_patch16_reg4_map_256", "4 registers", POOLED, "4-"),
    Member("vit_pe_core_tiny_patch16_384", "1 class", POOLED, "0-"),
    Member("naflexvit_base_patch16_map", "1 register", POOLED, "1-"),
    # Relative positions.
    Member("beit_base_patch16_224", "1 class", PATCHES, "1-"),
    Member("vit_relpos_small_patch16_224", "none", ALL, "0-"),
    Member("vit_relpos_medium_patch16_cls_224", "1 class", CLASS, "0"),
    Member("vit_relpos_base_patch16_clsgap_224", "1 class", PATCHES, "1-"),
    # Rotary positions.
    Member("eva02_tiny_patch14_224", "1 class", PATCHES, "1-"),
    Member("vit_small_patch16_dinov3", "1 class + 4 registers", PATCHES, "5-"),
    Member("vit_small_patch16_lingbot", "1 class + 4 registers", CLASS, "0"),
    Member("vit_small_patch16_rope_mixed_224", "1 class", CLASS, "0"),
    Member("vit_betwixt_patch16_rope_reg4_gap_256", "4 registers", PATCHES, "4-"),
    # Any size, towers of language models, class attention.
    Member("naflexvit_base_patch16_gap", "4 registers", PATCHES, "4-"),
    Member("gemma4_vit_167m", "none", ALL, "0-"),
    Member("qwen3_vit_88m", "none", ALL, "0-"),
    Member("deepseek_vit_412m", "none", ALL, "0-"),
    Member("cait_xxs24_224", "none", JOINING, "0-"),
)
# It has one width, and in double precision a third of a gigabyte.
LARGE = (Member("vit_base_patch16_sapiens2", "1 class + 8 registers", CLASS, "0"),)


def _require(name: str) -> None:
    if TIMM_IS_OLD and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")


@pytest.fixture(
    scope="module",
    params=[*MEMBERS, *(pytest.param(member, marks=pytest.mark.slow) for member in LARGE)],
    ids=str,
)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Member, Specimen]]:
    """One at a time, since together they would not fit into memory."""
    member: Member = request.param
    _require(member.name)
    specimen = collect(member.name, narrow=True)
    try:
        _ = specimen.trace  # kept, and needed by all tests
    except RuntimeError as error:
        if not TIMM_IS_OLD or "Float but found Double" not in str(error):
            raise
        pytest.skip(f"timm {timm.__version__} does not run {member.name} in double precision")
    yield member, specimen
    del specimen
    gc.collect()


@pytest.mark.slow
def test_specimen_would_show_a_mistake(pair: tuple[Member, Specimen]) -> None:
    assert_telling(pair[1])


def test_layout_is_what_was_written_down_by_hand(pair: tuple[Member, Specimen]) -> None:
    member, specimen = pair
    layout = specimen.loaded.layout
    assert layout.described_prefix() == member.prefix
    assert layout.readout is member.readout
    assert tuple(layout.grid) == GRID
    assert_layout_is_measured(specimen)


def test_logit_depends_on_the_tokens_that_are_read_and_no_others(
    pair: tuple[Member, Specimen],
) -> None:
    member, specimen = pair
    np.testing.assert_array_equal(specimen.rows_read, member.reads(specimen.tokens))
    assert_readout_is_measured(specimen)


@pytest.mark.slow
def test_relevance_equals_reference(pair: tuple[Member, Specimen]) -> None:
    specimen = pair[1]
    assert specimen.has_logit
    assert_relevance_equals_reference(specimen)


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, None])
def test_features_equal_those_of_timm_with_and_without_a_head(
    pair: tuple[Member, Specimen], block: int | None
) -> None:
    specimen = pair[1]
    expected = specimen.features(1 if block is None else block)
    headless = copy.deepcopy(specimen.module)
    headless.reset_classifier(0)  # type: ignore[operator]
    for model in (specimen.loaded, load_model(headless, device="cpu")):
        found = explain_batch(model, specimen.images(), Features(block=block)).relevance[:, 0]
        error = np.abs(found.numpy() - expected).max() / np.abs(expected).max()
        assert error < 1e-5


ALONE = "has no single sequence of transformer blocks"
CALLS = "visible attention calls in"
CHAIN = "attention maps cannot be multiplied;"
POOLS = "pools its tokens by"

REFUSED = {
    ALONE: (
        *("efficientformer_l1", "efficientformerv2_s1", "resnet50_clip", "fastvit_sa12"),
        *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"),
        *("mvitv2_tiny", "coatnet_nano_rw_224", "maxvit_nano_rw_256", "volo_d1_224", "pit_ti_224"),
        *("levit_512", "levit_128s", "caformer_s18", "poolformer_s12", "visformer_tiny"),
        *("mobilevit_xxs", "mobilevitv2_050", "gcvit_xxtiny", "davit_tiny", "tiny_vit_5m_224"),
        *("nest_tiny_jx", "pvt_v2_b0", "coat_tiny", "edgenext_xx_small", "focalnet_tiny_srf"),
        *("iformer_t", "nextvit_small", "efficientvit_b0", "efficientvit_m0", "sequencer2d_s"),
        *("resnet18", "convnext_atto", "botnet26t_256", "mambaout_femto", "lowformer_b0"),
    ),
    CALLS: (
        *("vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"),
        *("vit_dlittle_patch16_reg1_gap_256", "vit_small_patch16_18x2_224", "tnt_s_patch16_224"),
        *("crossvit_9_240", "twins_svt_small", "mixer_s16_224", "resmlp_12_224"),
        *("mobilenetv5_base", "convmixer_768_32", "efficientnet_b0"),
    ),
    CHAIN: (
        *("xcit_nano_12_p16_224", "convit_tiny", "hiera_tiny_224", "sam2_hiera_tiny"),
        "samvit_base_patch16_224",
    ),
    POOLS: (
        *("gemma4_vit_167m_enc", "deepseek_vit_412m_enc", "deepseek_vit_412m_align"),
        *("qwen3_vit_88m_enc", "qwen3_vit_88m_merge"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for reason, names in REFUSED.items() for name in names]
)
def test_family_for_which_rollout_is_not_defined_is_refused(name: str, reason: str) -> None:
    _require(name)
    skeleton = build_skeleton(name)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        read_layout(skeleton, preprocessing_of(skeleton).size)
    message = str(caught.value)
    assert message.startswith(type(skeleton).__name__)
    assert "\n" not in message
