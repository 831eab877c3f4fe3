"""What people type into the page's search finds the right node, ranked by the page itself."""

from __future__ import annotations

import pytest

from frugal.nodes._comfy import found_by

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
SHOWN = 3
SEARCH = """text => {
    const stores = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s;
    return stores.get("nodeDef").nodeSearchService.searchNode(text).map(node => node.name);
}"""
WANTED = {
    "sage": {"FrugalAttention"},
    "sageattention": {"FrugalAttention"},
    "teacache": {"FrugalStepCache"},
    "lightning": {"FrugalLoraSide", "FrugalSampler"},
    "lightx2v": {"FrugalLoraSide"},
    "4 step": {"FrugalSampler", "FrugalLoraSide"},
    "save vram": {"FrugalMemoryPlan"},
    "low vram": {"FrugalMemoryPlan"},
    "block swap": {"FrugalMemoryPlan"},
    "blockswap": {"FrugalMemoryPlan"},
    "oom": {"FrugalMemoryPlan"},
    "video combine": {"FrugalWanDecodeToFile"},
    "vhs": {"FrugalWanDecodeToFile"},
    "deflicker": {"FrugalMaskTemporal"},
    "gguf": {"FrugalLoadWan"},
    "wan i2v": {"FrugalLoadWan"},
    "wan 2.2": {"FrugalWanTwoExperts"},
    "high noise": {"FrugalWanTwoExperts"},
    "infinite video": {"FrugalCausalSampler", "FrugalCausalVideoFile"},
    "try on": {"FrugalTryOn"},
    "catvton": {"FrugalLoadCatVTON"},
    "cfg range": {"FrugalGuidanceRange"},
    "quantize": {"FrugalQuantize"},
    # Memory of the card, little of it, block swap; acceleration, four steps.
    "\u663e\u5b58": {"FrugalMemoryPlan"},
    "\u4f4e\u663e\u5b58": {"FrugalMemoryPlan"},
    "\u5757\u4ea4\u6362": {"FrugalMemoryPlan"},
    "\u52a0\u901f": {"FrugalLoraSide", "FrugalSampler"},
    "4\u6b65": {"FrugalLoraSide", "FrugalSampler"},
    # Try on, change clothes; image to video, quantized model; long video, save as video.
    "\u8bd5\u8863": {"FrugalTryOn"},
    "\u6362\u88c5": {"FrugalTryOn"},
    "\u56fe\u751f\u89c6\u9891": {"FrugalLoadWan"},
    "\u91cf\u5316": {"FrugalQuantize", "FrugalLoadWan"},
    "\u957f\u89c6\u9891": {"FrugalCausalVideoFile", "FrugalCausalSampler"},
    "\u4fdd\u5b58\u89c6\u9891": {"FrugalWanDecodeToFile"},
    # Mask, and its flicker.
    "\u8499\u7248": {"FrugalMaskRefine"},
    "\u53bb\u95ea\u70c1": {"FrugalMaskTemporal"},
}


def test_the_right_node_is_among_the_first_three(tab):
    if not found_by([]):
        pytest.skip("this ComfyUI has no search_aliases")
    found = {words: tab.page.evaluate(SEARCH, words)[:SHOWN] for words in WANTED}
    wrong = {words: found[words] for words in WANTED if not WANTED[words] & set(found[words])}
    assert not wrong


def test_what_is_not_there_is_not_found(tab):
    assert tab.page.evaluate(SEARCH, "zzqqxx") == []
