"""Kept rows give back every bit, and a context is found by its content alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.kernels.memory.cross_kv_report import ContextPlan, ContextReport
from frugal.kernels.memory.projected_rows import Distinct, distinct, keep, same_bits
from frugal.kernels.memory.prompt_table import Contexts
from frugal.tests.helpers import host_waits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def padded(lengths, rows=16, width=8, dtype=torch.float32, pad=0.0, seed=0) -> torch.Tensor:
    """[batch, rows, width]: `lengths` random rows each, then rows of `pad`."""
    make = torch.Generator().manual_seed(seed)
    x = torch.full((len(lengths), rows, width), pad)
    for item, length in enumerate(lengths):
        x[item, :length] = torch.randn(length, width, generator=make)
    return x.to(dtype)


def rows_by_hand(x: torch.Tensor) -> int:
    batch, rows, _ = x.shape
    kept = rows
    while kept > 1 and all(raw(x[item, kept - 2]) == raw(x[item, -1]) for item in range(batch)):
        kept -= 1
    return kept


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 16), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, -0.0, float("nan"), 1.5]),
)
def test_distinct_rows_and_back(lengths, dtype, pad):
    x = padded(lengths, dtype=dtype, pad=pad)
    x = torch.cat([x, x[:1], x.flip(1)[:1]])
    found = distinct(x)
    assert found.rows == rows_by_hand(x)
    items = [raw(item) for item in x]
    assert found.items == tuple(items.index(item) for item in items)
    kept = keep(x, found)
    assert raw(kept.tensor()) == raw(x)
    assert kept.rows.shape[:2] == (len(set(items)), found.rows)


def test_zero_and_minus_zero_are_not_one_row():
    x = torch.zeros(1, 6, 4)
    x[:, 4] = -0.0
    assert distinct(x).rows == 6
    x[:, 4] = 0.0
    assert distinct(x).rows == 1


def test_short_prompt_costs_its_length():
    values = padded([40], rows=512, width=32, dtype=torch.bfloat16)
    assert keep(values, distinct(values)).nbytes == 41 * 32 * 2


def test_equal_rows_that_came_out_unequal_are_all_kept():
    """A kernel that works in tiles may round the rows of a last, partial tile in another way."""
    x = padded([4])
    values = padded([4], pad=1.0)
    values[:, 15, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    kept = keep(values, distinct(x))
    assert raw(kept.tensor()) == raw(values) and kept.rows.shape[1] == 16


def test_equal_items_that_came_out_unequal_are_all_kept():
    values = padded([16, 16])
    kept = keep(values, Distinct(16, (0, 0)))
    assert raw(kept.tensor()) == raw(values) and len(kept.rows) == 2


def test_one_image_beside_two_prompts_costs_one():
    image = padded([257], rows=257, width=32, dtype=torch.bfloat16).expand(2, -1, -1)
    kept = keep(image, distinct(image))
    assert raw(kept.tensor()) == raw(image) and kept.nbytes == 257 * 32 * 2


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("lengths", [[5], [16]])
def test_what_is_given_out_may_be_written_to(lengths, fp8):
    values = padded(lengths)
    kept = keep(values, distinct(values), fp8)
    first = kept.tensor()
    before = raw(first)
    first.add_(1)
    values.add_(1)
    assert raw(kept.tensor()) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rounds_each_value_by_at_most_a_sixteenth(dtype):
    """e4m3 has 3 bits after the leading one; values below 2^-6 of the grid are spaced 2^-9."""
    values = (padded([9, 12], width=64, seed=2) * torch.logspace(-3, 3, 16)[:, None]).to(dtype)
    kept = keep(values, distinct(values), fp8=True)
    out = kept.tensor()
    assert out.dtype == dtype and out.shape == values.shape
    exact, error = values.double(), (out.double() - values.double()).abs()
    scale = exact.abs().amax(-1, keepdim=True) / 448
    more = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert (error <= exact.abs() * (2**-4 + more) + scale * 2**-10 + 1e-7).all()
    assert error.max() > 0
    assert kept.nbytes == 2 * distinct(values).rows * (64 + 4)


def test_found_by_content_and_state():
    table = Contexts(4)
    x = padded([5, 7])
    context = table.of(x, "weights")
    assert table.of(x.clone(), "weights") is context
    flipped = x.clone()
    flipped[1, 3, 2] = torch.nextafter(flipped[1, 3, 2], torch.tensor(9.0))
    for other, state in (
        (flipped, "weights"),
        (x, "other weights"),
        (x.flip(0), "weights"),
        (x[:1], "weights"),
        (x.double(), "weights"),
    ):
        assert table.of(other, state) is not context
    assert table.of(x, "weights") is not context, "five others came after it"


def test_the_one_not_asked_for_longest_goes_first():
    table = Contexts(2)
    first, second, third = (padded([3], seed=seed) for seed in range(3))
    one, two = table.of(first, None), table.of(second, None)
    assert table.of(first, None) is one
    table.of(third, None)
    assert table.of(first, None) is one
    assert table.of(second, None) is not two
    assert (len(table), table.made, table.dropped) == (2, 4, 2)


def test_what_was_given_may_change_afterwards():
    table = Contexts(2)
    x = padded([5])
    context = table.of(x, None)
    before = x.clone()
    x[0, 0, 0] += 1
    assert table.of(x, None) is not context
    assert table.of(before, None) is context


def test_views_and_bits():
    base = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    assert same_bits([base[:, 3:], base[:, 3:] + 1], base[:, 3:].clone()) == [True, False]
    nan = torch.tensor([float("nan")])
    assert same_bits([nan, nan.double(), nan[None]], nan.clone()) == [True, False, False]
    assert same_bits([torch.zeros(1)], -torch.zeros(1)) == [False] and same_bits([], nan) == []


def test_what_was_computed_for_a_prompt_is_found_with_one_wait():
    table = Contexts(4)
    prompts = [padded([n], rows=64, dtype=torch.bfloat16, seed=n) for n in (3, 5, 8)]
    for prompt in prompts:
        context = table.of(prompt, None)
        with host_waits.counted() as seen:
            for _ in range(4):
                context.values["layer"] = keep(prompt.clone(), context.repeats)
        # Once for each layer, when a prompt first comes.
        assert sum(seen.values()) == 4, seen
    with host_waits.counted() as seen:
        assert table.of(prompts[0].clone(), None).values["layer"].tensor().equal(prompts[0])
    assert seen.pop(("equal", "elsewhere")) == 1
    assert sum(seen.values()) == 1, seen


def test_table_counts_its_memory():
    table = Contexts(2)
    x = padded([5], dtype=torch.bfloat16)
    context = table.of(x, None)
    assert table.nbytes == x.nbytes
    context.values["layer"] = keep(x, context.repeats)
    assert table.nbytes == x.nbytes + 6 * 8 * 2


def test_plan_of_the_14b_models():
    """Published configuration of Wan 2.1 14B (arXiv 2503.20314): 40 blocks of width 5120, hidden
    13824, bf16; the shares are those of its linear layers, norms and modulation.
    """
    width, layers = 5120, 40
    linear = width * width + width
    attention = 4 * linear + 2 * width
    block = 2 * attention + 2 * width * 13824 + 13824 + width + 8 * width
    projection = layers * linear
    text = ContextPlan(80, 2 * 2 * projection, 2 * layers * block, 2 * 80 * width, 0)
    assert text.share == pytest.approx(0.149, abs=5e-4)
    image_block = block + 2 * linear + width
    both = ContextPlan(
        160, 2 * 4 * projection, 2 * layers * image_block, 2 * 80 * width, 2 * 80 * width
    )
    assert both.share == pytest.approx(0.26, abs=5e-4)
    assert "14.9 % of the blocks' weights" in text.text() and "419.4 MB" in text.text()
    assert "210.5 MB" in both.text() and "start image" not in text.text()


def test_report_says_what_a_user_can_act_on():
    report = ContextReport(8, 8, 24, 2, 1_500_000, 0, 0)
    assert report.text() == (
        "cross-attention cache: 24 layer results reused, 8 computed, in 8 calls of the model; "
        "2 contexts cached, 1.5 MB"
    )
    more = ContextReport(8, 8, 24, 2, 1_500_000, 3, 2_000_000, ("a layer was left alone",)).text()
    assert "offloaded from the device: 2.0 MB" in more
    assert "3 contexts were evicted" in more and "note: a layer was left alone" in more
