"""A Wan model as a diffusers folder in INT4: its keys against diffusers' own model, its bits, its
rest, and what is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize import command, gptq_layer, vllm_folder
from frugal.kernels.quantize.vllm_folder import ServerJob, export
from frugal.kernels.quantize.weights import Weights
from frugal.tests.helpers import wan as bed

T2V = bed.variant(bed.T2V, dim=128, ffn_dim=256, layers=1)
I2V = bed.variant(bed.I2V, dim=128, ffn_dim=256, layers=1)
KINDS = {"t2v": (T2V, "WanPipeline"), "i2v": (I2V, "WanImageToVideoPipeline")}
GROUP = 64
PACKED = ("qweight", "qzeros", "scales")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    held = bed.base(bed.weights(KINDS[kind][0]))[0]
    return bed.write(tmp_path_factory.mktemp("wan") / f"{kind}.safetensors", held, {})


def rest_of(folder: Path, pipeline: str, **settings) -> Path:
    """The other parts of a model: one large file, one small, one in a folder of its own."""
    parts = {
        "model_index.json": {
            "_class_name": pipeline,
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "transformer_2": [None, None],
            "vae": ["diffusers", "AutoencoderKLWan"],
            "boundary_ratio": None,
        },
        "vae/config.json": {"z_dim": 16},
        "vae/deep/more.json": {},
        "transformer/config.json": {"num_attention_heads": 2, "attention_head_dim": 64, **settings},
    }
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "vae" / "weights.safetensors").write_bytes(bytes(2 << 20))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"large")
    return folder


@pytest.fixture(scope="module")
def made(kind, source, tmp_path_factory):
    """(folder, report, the rest)"""
    place = tmp_path_factory.mktemp("server")
    rest = rest_of(place / "plain", KINDS[kind][1])
    report = export(ServerJob(source, place / "int4", rest, GROUP))
    return place / "int4", report, rest


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "transformer" / "config.json").read_text())


def test_diffusers_finds_every_key(made, source):
    diffusers = pytest.importorskip("diffusers")
    folder, report, _ = made
    config = config_of(folder)
    assert config.pop("quantization_config") == {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq",
        "data_type": "int", "bits": 4, "sym": True, "group_size": GROUP, "desc_act": False,
        "block_name_to_quantize": "blocks",
    }  # fmt: skip
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (2, 64)
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held, found, packed = weights_of(folder), {}, 0
    for name, tensor in held.items():
        layer, _, suffix = name.rpartition(".")
        if suffix not in PACKED:
            found[name] = tensor
        elif suffix == PACKED[0]:
            parts = {each: held[f"{layer}.{each}"] for each in PACKED}
            shape = expected[f"{layer}.weight"]
            found[f"{layer}.weight"] = gptq_layer.decode(parts, shape, GROUP)
            packed += 1
            assert layer.startswith("blocks.")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")
    }
    assert packed == len(linears) == report.layers
    # What diffusers computes with these weights is what it computes with ours under its names.
    original = Weights(source)
    for layer in original.shapes.keys() - set(original.large()):
        name = vllm_folder.to_diffusers(f"{layer}.weight")
        assert torch.equal(found[name], original.weight(layer))


def test_the_loader_reads_the_same_weights(made, source):
    """The folder's own transformer is a file for ComfyUI too: AutoRound's label is understood."""
    folder, report, _ = made
    again = Weights(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    original = Weights(source)
    lost = whole = 0.0
    for layer in original.large():
        assert again.layout(layer).format == "gptq"
        weight, meant = original.weight(layer).float(), again.weight(layer)
        parts = gptq_layer.encode(original.weight(layer), GROUP, "cpu")
        assert torch.equal(gptq_layer.decode(parts, original.shapes[layer], GROUP), meant)
        lost += float((meant - weight).square().sum())
        whole += float(weight.square().sum())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert 0.02 < report.error < 0.2


def test_the_rest_is_taken_over(made):
    folder, _, rest = made
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "vae/config.json", "vae/deep/more.json", "vae/weights.safetensors",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    # vLLM-Omni 0.30 takes the mere key for a second model.
    assert "transformer_2" not in index and index["vae"] == ["diffusers", "AutoencoderKLWan"]
    large, small = "vae/weights.safetensors", "vae/config.json"
    assert (folder / large).samefile(rest / large) and not (folder / small).samefile(rest / small)
    assert not list(folder.parent.glob("*.part"))


def test_without_a_rest_the_report_says_so(source, tmp_path):
    report = export(ServerJob(source, tmp_path / "alone", None, GROUP))
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["transformer"]
    assert "the transformer alone" in report.text()
    assert config_of(tmp_path / "alone")["num_attention_heads"] == 1


def test_refusals(source, kind, tmp_path):
    pipeline = KINDS[kind][1]
    other = "WanPipeline" if kind == "i2v" else "WanImageToVideoPipeline"
    rests = {
        other: rest_of(tmp_path / "kind", other),
        "num_layers": rest_of(tmp_path / "layers", pipeline, num_layers=30),
        "lacks the folder vae": rest_of(tmp_path / "whole", pipeline),
        "cannot be read": tmp_path / "none",
        "two transformers": rest_of(tmp_path / "two", pipeline),
    }
    weights = rests["lacks the folder vae"] / "vae"
    weights.rename(weights.with_name("elsewhere"))
    index = rests["two transformers"] / "model_index.json"
    text = index.read_text().replace("[null, null]", '["diffusers", "WanTransformer3DModel"]')
    index.write_text(text)
    for reason, rest in rests.items():
        with pytest.raises(FrugalError, match=reason):
            export(ServerJob(source, tmp_path / "out", rest, GROUP))
    (tmp_path / "out").mkdir()
    with pytest.raises(FrugalError, match="exists already"):
        export(ServerJob(source, tmp_path / "out", None, GROUP))
    with pytest.raises(FrugalError, match="not one of"):
        export(ServerJob(source, tmp_path / "new", None, 48))


def test_other_models_are_refused(tmp_path):
    config = bed.variant(bed.VACE, dim=128, ffn_dim=256, layers=1)
    held = bed.base(bed.weights(config))[0]
    path = bed.write(tmp_path / "vace.safetensors", held, {})
    with pytest.raises(FrugalError, match="is Wan VACE"):
        export(ServerJob(path, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_export_goes_on(source, tmp_path):
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise StopError

    job = ServerJob(source, tmp_path / "int4", None, GROUP)
    with pytest.raises(StopError):
        export(job, progress=stop)
    assert not job.folder.exists()
    (tmp_path / "int4.part" / "vae").mkdir()
    first: list[int] = []
    report = export(job, progress=lambda done, total: first.append(done) or None)
    whole = export(ServerJob(source, tmp_path / "whole", None, GROUP))
    assert first[0] > 0 and report.error == whole.error
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "int4" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What an earlier try with another rest had put there is gone.
    assert [path.name for path in job.folder.iterdir()] == ["transformer"]


def test_the_command(source, tmp_path, capsys):
    out = tmp_path / "int4"
    call = [str(source), str(out), "--to", command.SERVER, "--device", "cpu"]
    assert command.main([*call, "--group-size", "32"]) == 0
    assert config_of(out)["quantization_config"]["group_size"] == 32
    assert "layers INT4" in capsys.readouterr().out
    assert command.main(call) == 1 and "exists already" in capsys.readouterr().err
    assert command.main([*call, "--report"]) == 1 and "--report" in capsys.readouterr().err
    plain = [str(source), str(tmp_path / "x.safetensors"), "--to", "fp8", "--rest", str(out)]
    assert command.main(plain) == 1 and "--rest" in capsys.readouterr().err
