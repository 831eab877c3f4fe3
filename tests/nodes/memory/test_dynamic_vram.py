"""What a budget does where ComfyUI has dynamic VRAM, with a stand-in for its memory."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch

from frugal.kernels.memory.plan import BUFFERS, Job, MemoryOptions, latent_bytes
from frugal.nodes.memory import dynamic_vram, memory_plan_run, run_report_run
from frugal.tests.helpers import sampling as bed

CARD = torch.device("cuda", 0)
PAGE = dynamic_vram.PAGE


class Vbar:
    """As comfy-aimdo's ModelVBAR: pages above the watermark go and do not come back; those below
    the watermark's limit never give way.
    """

    def __init__(self, resident: int):
        self.resident, self.watermark, self.floor = resident, 1 << 40, 0

    def loaded_size(self):
        return self.resident

    def set_watermark(self, size):
        assert size % PAGE == 0
        self.watermark, self.resident = size, min(self.resident, size)

    def set_watermark_limit(self, size):
        self.floor = size

    def free_memory(self, size):
        gone = min(self.resident - self.floor, size)
        self.resident -= gone
        self.watermark = self.resident
        return gone


class Patcher:
    """Weights of `size` bytes, of which `resident` are in dynamic VRAM and `forced` beside it."""

    load_device, offload_device = CARD, torch.device("cpu")

    def __init__(self, size, resident=0, forced=0, dynamic=True, beside=()):
        self.total, self.forced, self.dynamic = size, forced, dynamic
        self.model, self.beside, self.unloaded = torch.nn.Module(), beside, []
        if dynamic:
            self.model.dynamic_vbars = {CARD: Vbar(resident)}

    @property
    def vbar(self):
        return self.model.dynamic_vbars[CARD]

    def is_dynamic(self):
        return self.dynamic

    def model_size(self):
        return self.total

    def loaded_size(self):
        return self.forced + (self.vbar.resident if self.dynamic else 0)

    def is_clone(self, other):
        return other.model is self.model

    def get_nested_additional_models(self):
        return list(self.beside)

    def partially_unload(self, device, amount):
        self.unloaded.append(amount)
        return amount


@pytest.fixture(autouse=True)
def aimdo(monkeypatch):
    """A comfy-aimdo with a limit."""
    module = SimpleNamespace(ModelVBAR=Vbar)
    monkeypatch.setitem(sys.modules, "comfy_aimdo.model_vbar", module)
    return module


def on_card(monkeypatch, *patchers):
    loaded = [SimpleNamespace(device=CARD, model=each) for each in patchers]
    loaded += [
        SimpleNamespace(device=CARD, model=None),
        SimpleNamespace(device=torch.device("cpu"), model=Patcher(PAGE, PAGE)),
    ]
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", loaded)


def test_what_fits_is_left_alone(monkeypatch):
    ours, other = Patcher(10 * PAGE, 4 * PAGE), Patcher(5 * PAGE, 5 * PAGE)
    on_card(monkeypatch, ours, other)
    dynamic_vram.share(ours, 15 * PAGE, PAGE)
    assert other.vbar.resident == 5 * PAGE and ours.vbar.watermark == 1 << 40


def test_others_give_way_first(monkeypatch):
    ours, other = Patcher(10 * PAGE, 4 * PAGE), Patcher(5 * PAGE, 5 * PAGE)
    twin = Patcher(10 * PAGE)
    twin.model = ours.model
    on_card(monkeypatch, twin, ours, other)
    dynamic_vram.share(ours, 12 * PAGE, PAGE)
    assert other.vbar.resident == 2 * PAGE
    assert ours.vbar.watermark == 1 << 40 and ours.vbar.resident == 4 * PAGE
    assert other.vbar.floor == ours.vbar.floor == 0


def test_then_our_own_are_limited_in_whole_pages(monkeypatch):
    lora = Patcher(PAGE)
    ours = Patcher(10 * PAGE, 10 * PAGE, forced=PAGE // 2, beside=[lora])
    static, other = Patcher(3 * PAGE, forced=2 * PAGE, dynamic=False), Patcher(PAGE, PAGE)
    on_card(monkeypatch, ours, lora, static, other)
    dynamic_vram.share(ours, 9 * PAGE, PAGE)
    assert other.vbar.resident == 0 and not static.unloaded
    # 9 less 2 of the static model, 1 on its way, 1 of the LoRA and the half that stays in any case.
    assert ours.vbar.watermark == ours.vbar.resident == 4 * PAGE
    dynamic_vram.share(ours, PAGE, PAGE)
    assert ours.vbar.watermark == ours.vbar.resident == 0


def test_without_a_limit_nothing_is_done_and_it_is_said(monkeypatch, aimdo):
    """set_watermark_limit, which older versions have alone, would do the contrary."""
    aimdo.ModelVBAR = SimpleNamespace(set_watermark_limit=None)
    ours = Patcher(10 * PAGE, 4 * PAGE)
    on_card(monkeypatch, ours)
    dynamic_vram.share(ours, PAGE, PAGE)
    assert ours.vbar.watermark == 1 << 40 and ours.vbar.floor == 0
    assert "ComfyUI decides" in dynamic_vram.note(ours)
    monkeypatch.delitem(sys.modules, "comfy_aimdo.model_vbar")
    assert "ComfyUI decides" in dynamic_vram.note(ours)
    assert "without dynamic VRAM" in dynamic_vram.note(Patcher(1, dynamic=False))


def test_released_is_what_can_come_back(monkeypatch):
    # Asked for more than its pages hold, ComfyUI would also take what a run needs in place.
    ours = Patcher(10 * PAGE, 2 * PAGE, forced=PAGE)
    assert dynamic_vram.release(ours, 5 * PAGE) == 2 * PAGE and not ours.unloaded
    assert dynamic_vram.release(ours, 5 * PAGE) == 0
    static = Patcher(10 * PAGE, forced=PAGE, dynamic=False)
    assert dynamic_vram.release(static, 5 * PAGE) == 5 * PAGE == static.unloaded[0]


def test_a_size_is_that_on_the_device():
    patcher = Patcher(0)
    linear = patcher.model.linear = torch.nn.Linear(4, 6)
    linear.weight_comfy_model_dtype = torch.bfloat16
    patcher.total = linear.weight.nbytes + linear.bias.nbytes
    assert dynamic_vram.size(patcher) == linear.weight.nbytes // 2 + linear.bias.nbytes
    patcher.dynamic = False
    assert dynamic_vram.size(patcher) == patcher.total


def test_memory_that_the_allocator_does_not_see_is_counted(monkeypatch):
    on_card(monkeypatch, Patcher(9 * PAGE, 4 * PAGE), Patcher(PAGE, PAGE, dynamic=False))
    assert run_report_run.METER.look(CARD) == dynamic_vram.held_on(CARD) == 4 * PAGE
    assert run_report_run.METER.look(torch.device("cpu")) == 0


def test_a_run_shares_what_its_forward_leaves(wan, prompts, monkeypatch):
    shared = []
    monkeypatch.setattr(dynamic_vram, "is_dynamic", lambda _: True)
    monkeypatch.setattr(dynamic_vram, "share", lambda _, *sizes: shared.append(sizes))
    plan, peaks = memory_plan_run.plan_of(wan, Job(64, 64, 5), 0.1)
    shape = tuple(bed.latent_of().shape[2:])
    clone = memory_plan_run.apply(
        memory_plan_run.apply(wan, plan, peaks, False, None), plan, peaks, True, None
    )
    bed.sample(clone, prompts, 1)
    needed = peaks.of(2, shape, MemoryOptions()) + latent_bytes(1, shape)
    assert shared == [(10**8 - needed, BUFFERS * memory_plan_run.weights_of(wan).largest)]
    # Neither a plan without a budget nor the MODEL itself is limited.
    bed.sample(memory_plan_run.apply(wan, plan, peaks, False, None), prompts, 1)
    bed.sample(wan, prompts, 1)
    assert len(shared) == 1
