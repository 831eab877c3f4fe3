"""The choice of an attention kernel: faults, 8-bit rules, what is remembered."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from frugal.kernels.attention import KernelSelector, attention, check, measure, tuning_cache
from frugal.kernels.attention.backends import CHUNKED, TORCH, Backend
from frugal.kernels.attention.call import bucket, describe
from frugal.kernels.attention.call_report import table
from frugal.kernels.errors import FrugalError
from frugal.tests.helpers.attention import by_rows, fake, off, tensors

CPU = torch.device("cpu")


def raises(out):
    raise RuntimeError("no kernel image")


def nan(out):
    out = out.clone()
    out[-1, -1, -1, -1] = torch.nan
    return out


def one_head_wrong(out):
    out = out.clone()
    out[1, 2] *= 1.05
    return out


FAULTS = {
    "raises": (raises, None, "raised RuntimeError: no kernel image"),
    "nan": (nan, None, "gave NaN or infinite numbers"),
    "dtype": (lambda out: out.double(), None, "gave torch.float64"),
    "layout": (lambda out: out.transpose(1, 2), None, r"gave shape \(2, 9, 4, 40\)"),
    "values": (one_head_wrong, None, "is off by 0.05"),
    "in place": (lambda out: out, lambda k: k.sub_(k.mean(2, True)), "changes k in place"),
    "text": (lambda out: "ok", None, "gave a str"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("choice", ["auto", "bad"])
def test_a_faulty_kernel_is_replaced(fault, choice):
    change, spoil, reason = FAULTS[fault]
    bad = fake("bad", change, spoil)
    kernel_selector = KernelSelector(CPU, choice, backends=(bad, TORCH))
    q, k, v = tensors()
    before = [each.clone() for each in (q, k, v)]
    for _ in range(2):
        found = kernel_selector.attend(q, k, v)
        assert off(found, by_rows(q, k, v, None, 40**-0.5)) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    (row,) = table(kernel_selector).rows
    assert (row.backend, row.calls) == ("torch", 2)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(row.refused["bad"])
    assert bad.run.calls == 1, "a kernel that was turned down was called again"


def test_a_kernel_that_fails_later_is_replaced():
    healthy = [True]
    flaky = fake("flaky", lambda out: out if healthy else raises(out))
    kernel_selector = KernelSelector(CPU, "flaky", backends=(flaky, TORCH))
    q, k, v = tensors()
    kernel_selector.attend(q, k, v)
    assert table(kernel_selector).rows[0].backend == "flaky"
    healthy.clear()
    for chained, used in ((False, "torch"), (True, "handed on")):
        kernel_selector.broken.clear()
        found = kernel_selector.attend(q, k, v, chained=chained)
        assert found is None if chained else off(found, by_rows(q, k, v, None, 40**-0.5)) < 1e-6
        assert "no kernel image" in table(kernel_selector).broken["flaky"]
        assert table(kernel_selector).rows[0].backend == used
        healthy.append(True)
        kernel_selector = KernelSelector(CPU, "flaky", backends=(flaky, TORCH))
        kernel_selector.attend(q, k, v, chained=True)
        healthy.clear()


def test_without_a_kernel_left_the_error_is_shown():
    healthy = [True]
    flaky = fake("flaky", lambda out: out if healthy else raises(out))
    kernel_selector = KernelSelector(CPU, backends=(flaky,))
    kernel_selector.attend(*tensors())
    healthy.clear()
    with pytest.raises(RuntimeError, match="no kernel image"):
        kernel_selector.attend(*tensors())


def eight_bits(**options):
    """Off by about 1 %: more than an exact kernel may be, less than an 8-bit one may."""
    return fake("eight", lambda out: out * 1.02, exact=False, **options)


@pytest.mark.parametrize(
    ("keys", "allow", "here", "used"),
    [
        (1024, True, True, "eight"),
        (1023, True, True, "torch"),
        (257, True, True, "torch"),
        (1024, False, True, "torch"),
        (1024, True, False, "torch"),
    ],
)
def test_eight_bits_only_where_allowed(keys, allow, here, used):
    kernel_selector = KernelSelector(CPU, "eight", allow, backends=(eight_bits(), TORCH))
    q, k, v = tensors(B=1, H=2, Lk=keys)
    kernel_selector.attend(q, k, v, lossy=here)
    assert table(kernel_selector).rows[0].backend == used


def test_an_exact_kernel_is_held_to_more():
    kernel_selector = KernelSelector(CPU, backends=(replace(eight_bits(), exact=True), TORCH))
    kernel_selector.attend(*tensors())
    assert "is off by 0.02" in table(kernel_selector).rows[0].refused["eight"]


def test_what_the_named_kernel_declines_is_handed_on():
    kernel_selector = KernelSelector(CPU, "eight", True, backends=(eight_bits(), TORCH))
    assert (
        kernel_selector.attend(*tensors(), chained=True) is None and kernel_selector.handed_on == 1
    )
    assert table(kernel_selector).rows[0].backend == "handed on"


def test_the_default_takes_part():
    q, k, v = tensors(B=1, Lq=64, Lk=64)
    slow = fake("slow", lambda out: CHUNKED.run(*tensors(Lq=600, Lk=600), None, 1.0) is None or out)
    kernel_selector = KernelSelector(CPU, backends=(slow,))
    default = fake("default")
    assert kernel_selector.attend(q, k, v, default=default.run) is None
    row = table(kernel_selector).rows[0]
    assert row.backend == "default" and row.default_ms is not None and row.default_ms > 0
    wrong = KernelSelector(CPU, backends=(slow,))
    assert wrong.attend(q, k, v, default=fake("d", lambda out: out * 1.1).run) is not None
    assert "is off by 0.1" in table(wrong).rows[0].refused["default"]


def test_a_choice_is_remembered(tmp_path):
    path = tmp_path / "user" / "attention.json"
    q, k, v = tensors()

    def run_once(torch_version=None):
        first, second = fake("first"), fake("second")
        kernel_selector = KernelSelector(
            CPU, backends=(first, second), decisions=tuning_cache.load(path)
        )
        if torch_version:
            kernel_selector.place = kernel_selector.place.replace(torch.__version__, torch_version)
        kernel_selector.attend(q, k, v)
        tuning_cache.save(path, kernel_selector.fresh)
        return first.run.calls + second.run.calls, table(kernel_selector).rows[0].source

    calls, source = run_once()
    assert calls >= 6 and source == "measured"
    assert run_once() == (1, "remembered")
    assert run_once("0.0")[1] == "measured"
    assert run_once() == (1, "remembered")
    for broken in (
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "choices": {"a": {"ranking": 1}}}',
    ):
        path.write_text(broken)
        assert run_once()[1] == "measured"
        assert json.loads(path.read_text())["choices"]
    assert [each.name for each in path.parent.iterdir()] == ["attention.json"]


def test_a_new_kernel_is_measured(tmp_path):
    q, k, v = tensors()
    old = KernelSelector(CPU, backends=(TORCH,))
    old.attend(q, k, v)
    new = KernelSelector(CPU, backends=(TORCH, fake("new")), decisions=old.fresh)
    new.attend(q, k, v)
    assert {name for name, _ in next(iter(new.fresh.values())).ranking} == {"torch", "new"}


def test_near_lengths_share_a_choice():
    assert bucket(75600) == bucket(74000) != bucket(60000)
    assert [bucket(n) for n in (1, 7, 8, 15, 16, 17, 33)] == [1, 7, 8, 15, 16, 18, 36]
    keys = {describe(*tensors(Lq=n, Lk=n), None).key() for n in (500, 505, 512)}
    assert len(keys) == 1


def test_tensors_that_do_not_belong_together():
    q, k, v = tensors()
    for wrong in ((q, k[:, :, :5], v), (q, k, v[..., None]), (q[:, :3], k, v), (q, k.double(), v)):
        with pytest.raises(FrugalError, match="expected"):
            attention(*wrong)
    with pytest.raises(FrugalError, match="5 axes; expected 2, 3 or 4"):
        attention(q, k, v, torch.zeros(1, 1, 1, 1, 13))


def test_unknown_or_absent_kernels_are_named():
    with pytest.raises(FrugalError, match="auto or one of torch, "):
        KernelSelector(CPU, "sauge")
    absent = Backend("none", TORCH.run, devices=(), package="no_such_package")
    with pytest.raises(FrugalError, match="none is not installed; expected"):
        KernelSelector(CPU, "none", backends=(absent, TORCH))


def test_spare_kernels_wait():
    fallback, first = fake("spare", fallback=True), fake("first")
    kernel_selector = KernelSelector(CPU, backends=(fallback, first))
    kernel_selector.attend(*tensors())
    assert fallback.run.calls == 0 and table(kernel_selector).rows[0].backend == "first"
    bad = fake("bad", raises)
    kernel_selector = KernelSelector(CPU, backends=(fallback, bad))
    kernel_selector.attend(*tensors())
    row = table(kernel_selector).rows[0]
    assert row.backend == "spare" and "no kernel image" in row.refused["bad"]


def no_memory(out):
    raise torch.OutOfMemoryError("tried to allocate 20 GiB")


def test_want_of_memory_is_not_remembered(tmp_path):
    path = tmp_path / "attention.json"
    kernel_selector = KernelSelector(CPU, backends=(fake("large", no_memory), TORCH))
    kernel_selector.attend(*tensors())
    assert "tried to allocate" in table(kernel_selector).rows[0].refused["large"]
    tuning_cache.save(path, kernel_selector.fresh)
    assert tuning_cache.load(path) == {}


def test_want_of_memory_in_a_run_is_no_verdict():
    short = []
    large = fake("large", lambda out: no_memory(out) if short else out)
    kernel_selector = KernelSelector(CPU, "large", backends=(large, TORCH))
    q, k, v = tensors()
    kernel_selector.attend(q, k, v)
    short.append(True)
    assert off(kernel_selector.attend(q, k, v), by_rows(q, k, v, None, 40**-0.5)) < 1e-6
    short.clear()
    calls = large.run.calls
    kernel_selector.attend(q, k, v)
    assert large.run.calls == calls + 1 and not table(kernel_selector).broken


def test_the_whole_call_is_judged_too():
    """On a GPU the trial sees a part; what only the whole call shows is still seen."""
    tensors_of_call = (*tensors(), None)
    scale = 40**-0.5
    assert measure._rehearsal(TORCH, tensors_of_call, scale) is None
    assert "off by" in measure._rehearsal(fake("wrong", one_head_wrong), tensors_of_call, scale)
    assert "no kernel image" in measure._rehearsal(fake("bad", raises), tensors_of_call, scale)
    spoiler = fake("spoiler", spoil=lambda k: k.add_(1))
    with pytest.raises(FrugalError, match="spoiler changed its inputs"):
        measure._rehearsal(spoiler, tensors_of_call, scale)


def test_a_trial_takes_whole_groups_of_heads(monkeypatch):
    q, k, v = tensors(B=2, H=6, Hkv=3, Lq=50, Lk=70)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    for flops, shape in ((1e12, (2, 6, 50)), (3e6, (1, 4, 50)), (6e5, (1, 2, 26))):
        part = measure._part(q, k, v, mask, flops)
        assert part[0].shape[:3] == shape and part[1].shape[1] * 2 == shape[1]
        assert part[3].expand(*shape, 70).shape == (*shape, 70)
        off_by = check.complaint(attention(*part), *part, 40**-0.5, True)
        assert off_by is None


def test_looking_at_the_inputs_takes_little_memory():
    """Of a whole q on a card, beside a model that fills it; summed at once it took four times q."""
    q = torch.randn(1, 6, 4000, 64).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        before = check.fingerprint(q)
    assert max(-each.self_cpu_memory_usage for each in seen.events()) < q.nbytes
    q[0, 5, 3999, 63] += 1
    assert check.fingerprint(q) != before
