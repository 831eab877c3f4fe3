"""Blocks as the compiler gets them: one graph without weights, and refusals that say why."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from frugal.kernels.compile import operators
from frugal.kernels.compile.graphs import Graphs, probe
from frugal.kernels.compile.report import CompileReport
from frugal.kernels.compile.shadow import shadow
from frugal.kernels.errors import FrugalError

WIDTH = 24
# Graphs as PyTorch captures them and splits off what mutates, but run without a C++ compiler.
BACKEND = "aot_eager"


class Mix(torch.nn.Module):
    """What a transformer block is made of, with everything that the copy has to tell apart."""

    def __init__(self):
        super().__init__()
        self.before = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.after = torch.nn.LayerNorm(WIDTH)
        self.inner = Inner()
        self.feed = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.GELU(), torch.nn.Linear(2 * WIDTH, WIDTH)
        )
        self.skip = torch.nn.Identity()
        self.gate = torch.nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x):
        x = x + self.gate * self.inner(self.before(x))
        return x + self.feed(self.skip(self.after(x)))


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = torch.nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x):
        return torch.tanh(self.norm(self.q(x)))


def fetch(layer, device, dtype):
    found = (layer.weight, getattr(layer, "bias", None))
    return [each.to(device, dtype, copy=True) for each in found if each is not None]


def block(seed=0):
    torch.manual_seed(seed)
    made = Mix()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(False), std=0.3)
    return made


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def x(rows=7, batch=2):
    return torch.randn(batch, rows, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("backend", ["eager", BACKEND])
def test_every_block_runs_in_the_first_ones_graph(backend):
    graphs = Graphs(backend)
    made = []
    for seed in range(3):
        own = block(seed)
        out, new, seconds = graphs(shadow(own, fetch), x())
        torch.testing.assert_close(out, own(x()))
        made.append(new)
        assert (seconds > 0) == (new > 0)
    assert made == [1, 0, 0]


def test_the_graph_holds_no_weight_but_the_blocks_own_parameter(monkeypatch):
    own, seen = block(), []
    monkeypatch.setattr(
        torch._dynamo,
        "lookup_backend",
        lambda _: lambda graph, inputs: seen.extend(inputs) or graph,
    )
    Graphs("any")(shadow(own, fetch), x())
    held = {id(each) for each in own.parameters()} & {id(each) for each in seen}
    assert held == {id(own.gate)}
    sizes = sorted(each.numel() for each in seen)
    # One number for each of: three norms less the one without weights, q, and the feed-forward.
    assert sizes == [1, 1, 1, 1, WIDTH, x().numel()]


def test_weights_that_change_are_seen_without_a_new_graph():
    own, graphs = block(), Graphs(BACKEND)
    twin = shadow(own, fetch)
    first, _, _ = graphs(twin, x())
    own.inner.q.weight.mul_(2)
    own.after.bias = torch.nn.Parameter(own.after.bias + 1, requires_grad=False)
    own.gate = torch.nn.Parameter(own.gate * 3, requires_grad=False)
    out, new, _ = graphs(twin, x())
    torch.testing.assert_close(out, own(x()))
    assert new == 0 and not torch.allclose(out, first)


def test_a_layer_with_a_forward_or_a_hook_of_its_own_keeps_it():
    own = block()
    own.feed[0].forward = lambda x: torch.zeros(*x.shape[:-1], 2 * WIDTH)
    own.inner.norm.forward = lambda x: 5 * x
    own.after.register_forward_hook(lambda module, given, out: -out)
    out, _, _ = Graphs(BACKEND)(shadow(own, fetch), x())
    torch.testing.assert_close(out, own(x()))


def test_the_original_stays_as_it_was():
    own = block()
    before = {name: dict(vars(module)) for name, module in own.named_modules()}
    twin = shadow(own, fetch)
    Graphs("eager")(twin, x())
    assert {name: dict(vars(module)) for name, module in own.named_modules()} == before
    assert not any(a is b for a in own.inner.modules() for b in twin.inner.modules())


def test_a_forward_that_was_put_back_is_no_change():
    own = block()
    own.inner.forward = own.inner.forward
    out, _, _ = Graphs("eager")(shadow(own, fetch), x())
    own.inner.q.weight.mul_(2)
    again, _, _ = Graphs("eager")(shadow(own, fetch), x())
    assert not torch.equal(out, again)
    torch.testing.assert_close(again, own(x()))


@pytest.mark.parametrize("part", ["inner", "skip"])
def test_a_changed_container_is_refused_by_name(part):
    own = block()
    getattr(own, part).forward = lambda x: x
    with pytest.raises(FrugalError, match=rf"block\.{part} .* was changed by another node"):
        shadow(own, fetch)


def test_an_unknown_layer_with_weights_is_refused():
    own = block()
    own.skip = torch.nn.PReLU()
    with pytest.raises(FrugalError, match=r"block\.skip \(PReLU\) is of no known kind"):
        shadow(own, fetch)


@pytest.mark.parametrize(
    "forward", [lambda x: x.double(), lambda x: x[..., :-1]], ids=["type", "width"]
)
def test_a_layer_that_gives_something_else_than_the_graph_expects_is_an_error(forward):
    own = block()
    own.inner.q.forward = forward
    with pytest.raises(FrugalError, match="as the graph was made for"):
        Graphs(BACKEND)(shadow(own, fetch), x())


def test_a_layer_that_is_gone_is_an_error():
    own = block()
    twin = copy.copy(shadow(own, fetch).feed)
    del own
    gc.collect()
    with pytest.raises(FrugalError, match="which is gone"):
        Graphs("eager")(twin, x())


def test_attention_outside_a_run_is_an_error_and_inside_is_the_runs():
    q = torch.randn(1, 4, 8)
    with pytest.raises(FrugalError, match="outside a sampling run"):
        operators.block_attention(q, q, q, None, 2, True)
    with operators.attending(lambda q, k, v, heads, mask, low: q * heads + low):
        assert torch.equal(operators.block_attention(q, q, q, None, 2, True), q * 2 + 1)
        with operators.attending(lambda *_: -q):
            assert torch.equal(operators.block_attention(q, q, q, None, 2, True), -q)
        assert torch.equal(operators.block_attention(q, q, q, None, 2, False), q * 2)


def test_more_kinds_of_input_than_pytorch_keeps_do_not_stop_it():
    own, graphs = block(), Graphs("eager")
    twin, made = shadow(own, fetch), []
    with torch._dynamo.config.patch(recompile_limit=2):
        for axes in range(1, 6):
            given = torch.randn(*range(2, axes + 1), WIDTH)
            out, new, _ = graphs(twin, given)
            torch.testing.assert_close(out, own(given))
            made.append(new)
    assert made == [1] * 5


def test_what_cannot_be_compiled_is_an_error_that_says_so():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
        with pytest.raises(FrugalError, match=r"could not compile.*no compiler here"):
            probe(torch.device("cpu"), "one that is broken")


class Breaks(torch.nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def test_a_graph_break_is_an_error():
    with pytest.raises(FrugalError, match="could not compile"):
        Graphs("eager")(Breaks(), x())


def test_report():
    report = CompileReport()
    assert "no block ran" in report.text()
    report.computed(1, 2.5)
    report.computed(0, 0.0)
    report.left("attn1_patch")
    assert report.text().splitlines() == [
        "compiled blocks: 2 calls, 1 graphs made in 2.5 s",
        "1 calls of blocks ran uncompiled because of attn1_patch",
    ]
    assert report.data()["uncompiled"] == {"attn1_patch": 1}
