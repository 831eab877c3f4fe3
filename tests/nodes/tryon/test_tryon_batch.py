"""Many try-ons at once: equal to one at a time, whatever runs out on the way."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from PIL import Image

from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon import batching
from frugal.nodes.tryon import batch, batch_run, glue, item_noise, nodes

pytestmark = pytest.mark.usefixtures("no_grad")
SIZE = (96, 64)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def singles(bed):
    """What the six pictures of `scenery` are, made one by one."""
    with torch.no_grad():
        return expected(bed, *scenery())


def scenery(persons=((70, 60), (70, 60), (90, 50)), garments=2):
    """Photos of the given sizes, a mask each, and garments."""
    g = torch.Generator().manual_seed(3)
    photos = [torch.rand(1, *size, 3, generator=g) for size in persons]
    masks = [torch.zeros(1, *size) for size in persons]
    for i, mask in enumerate(masks):
        mask[:, 20 : 45 + i, 15:40] = 1
    return photos, masks, [torch.rand(1, 40 + 9 * i, 30, 4, generator=g) for i in range(garments)]


def run(bed, photos, masks, garments, **given):
    """Photos and report text of the batch node as the executor calls it: everything a list."""
    widgets = {
        "combine": batching.ALL, "width": 64, "height": 96, "fit": "crop around mask", "steps": 2,
        "cfg": 2.5, "eta": 1.0, "seed": 40, "mask_blur": 2, "memory_budget": 0.0,
        "largest_group": 8,
    }  # fmt: skip
    lists = {name: [value] for name, value in {**widgets, **given}.items() if value is not None}
    for name in ("width", "height"):
        if isinstance(given.get(name), list):
            lists[name] = given[name]
    node = batch.FrugalTryOnBatch.PREPARE_CLASS_CLONE(None)
    return node.execute(
        model=[bed[0]], vae=[bed[1]], persons=photos, garments=garments, masks=masks, **lists
    ).args


def by_hand(bed, photo, mask, garment, seed, size=SIZE, sampler=None, sigmas=None, match=False):
    """One picture through the nodes of the family and core's sampling, as a user would wire it."""

    def execute(node, *args):
        return node.PREPARE_CLASS_CLONE(None).execute(*args).args

    model, vae = bed
    person, cloth, small, frame = execute(
        nodes.FrugalTryOnPrepare,
        photo,
        garment,
        mask,
        size[1],
        size[0],
        "crop around mask",
        25,
        0.5,
    )
    positive, negative, latent = execute(nodes.FrugalTryOnConditioning, person, cloth, small, vae)
    if sampler is None:
        sigmas, sampler = execute(nodes.FrugalTryOnSigmas, model, 2, 1.0)
    start = latent["samples"]
    samples = comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(start, seed), 2.5, sampler, sigmas, positive, negative,
        start, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return execute(nodes.FrugalTryOnStitch, {"samples": samples}, vae, frame, 2, match)[0]


def expected(bed, photos, masks, garments, **how):
    pairs = batching.jobs(len(photos), len(garments), batching.ALL)
    return [
        by_hand(bed, photos[p], masks[p], garments[g], 40 + i, **how)
        for i, (p, g) in enumerate(pairs)
    ]


def check_equal(found, wanted, tolerance=1e-5):
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, i
        assert (a - b).abs().max() <= tolerance, (i, (a - b).abs().max())


def test_a_batch_equals_singles_in_order(bed, singles):
    scene, wanted = scenery(), singles
    found, report = run(bed, *scene)
    check_equal(found, wanted)
    # Able to fail: neighbours differ by far more than the tolerance.
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert "groups of 6 " in report and "encoded 3 persons and 2 garments" in report
    assert "memory ran out 0 times" in report
    # One image batch in place of a list, and other groups: the same pictures.
    two = [torch.cat(scene[0][:2])], [torch.cat(scene[1][:2])], scene[2]
    found, report = run(bed, *two, largest_group=3)
    check_equal(found, wanted[:4])
    assert "groups of 3, 1 " in report


def test_pairs_sizes_and_one_mask_for_all(bed):
    photos, masks, garments = scenery(garments=3)
    found, report = run(
        bed,
        photos,
        masks,
        garments,
        combine=batching.PAIRS,
        width=[64, 48, 64],
        height=[96, 64, 96],
    )
    sizes = [(96, 64), (64, 48), (96, 64)]
    wanted = [
        by_hand(bed, photos[i], masks[i], garments[i], 40 + i, size=sizes[i]) for i in range(3)
    ]
    check_equal(found, wanted)
    # The small canvas first, then both large ones together.
    assert "groups of 1, 2 " in report and "48 x 64 px, 64 x 96 px" in report
    found, _ = run(bed, photos[:2], masks[:1], garments[:1])
    check_equal(found, [by_hand(bed, photos[i], masks[0], garments[0], 40 + i) for i in range(2)])


def test_the_budget_sets_the_group(bed):
    each = batch_run.bytes_per_picture(bed[0], SIZE, 8, True)
    scene = scenery()
    for count in (1, 2):
        _, report = run(bed, *scene, memory_budget=(count + 0.5) * each / 2**30)
        assert f"groups of {', '.join([str(count)] * (6 // count))} (" in report


class Exhausted:
    """Makes memory run out in a clone of the model: for batches too large, or in one call."""

    def __init__(self, model, room=10**9, at=0, error=None):
        self.calls, self.room, self.at = 0, room, at
        self.error = error or torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")
        self.model = model.clone()
        self.model.set_model_unet_function_wrapper(self.step)

    def step(self, apply, options):
        self.calls += 1
        pictures = len(options["input"]) // len(options["cond_or_uncond"])
        if pictures > self.room or self.calls == self.at:
            raise self.error
        return apply(options["input"], options["timestep"], **options["c"])


@pytest.mark.parametrize("room", [1, 3])
def test_no_picture_is_lost_when_memory_runs_out(bed, singles, room):
    scene = scenery()
    found, report = run((Exhausted(bed[0], room).model, bed[1]), *scene)
    check_equal(found, singles)
    assert f"groups of {', '.join([str(room)] * (6 // room))} (" in report


@pytest.mark.parametrize("at", range(1, 7))
def test_memory_may_run_out_at_any_step(bed, singles, at):
    """Groups of two, two steps each: calls 1 to 6 are every step of every group."""
    scene = scenery()
    bent = Exhausted(bed[0], at=at)
    found, report = run((bent.model, bed[1]), *scene, largest_group=2)
    check_equal(found, singles)
    assert "memory ran out 1 times" in report and bent.calls > 6


def test_main_memory_counts_too_and_other_errors_do_not(bed):
    scene = scenery()
    told = RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    )
    found, _ = run((Exhausted(bed[0], 2, error=told).model, bed[1]), *scene)
    assert len(found) == 6
    with pytest.raises(RuntimeError, match="shapes"):
        run((Exhausted(bed[0], 2, error=RuntimeError("shapes")).model, bed[1]), *scene)


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def test_one_alone_that_fails_leaves_the_finished_ones(bed, output):
    """The small canvas fits, the large one never does."""
    photos, masks, garments = scenery()
    model = bed[0].clone()

    def step(apply, options):
        if options["input"].shape[-1] > 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")
        return apply(options["input"], options["timestep"], **options["c"])

    model.set_model_unet_function_wrapper(step)
    with pytest.raises(FrugalError) as caught:
        run((model, bed[1]), photos, masks, garments, width=[64, 48, 64], height=[96, 64, 96])
    text = str(caught.value)
    assert "64 x 96 px" in text and "picture 1 alone" in text and "smaller canvas" in text
    files = sorted(path.name for path in output.rglob("*") if path.is_file())
    assert files == [f"tryon_unfinished_00001_picture_{n}.png" for n in (3, 4)]
    assert "the 2 finished pictures are in output/frugal/tryon_unfinished_00001" in text
    for number, garment in ((3, 0), (4, 1)):
        one = by_hand(bed, photos[1], masks[1], garments[garment], 39 + number, size=(64, 48))
        kept = Image.open(output / "frugal" / f"tryon_unfinished_00001_picture_{number}.png")
        assert kept.size == (60, 70)
        kept = torch.tensor(list(kept.getdata())).view(70, 60, 3)
        assert ((one[0] * 255).int() - kept).abs().max() <= 1


def test_one_that_cannot_be_stitched_costs_itself_alone(bed, output):
    """Its mask fills the photo, so there is no ring to match colours in; the others are kept."""
    photos, masks, garments = scenery(garments=1)
    masks[1] = torch.ones_like(masks[1])
    found, report = run(bed, photos, masks, garments, color_match=True)
    wanted = [by_hand(bed, photos[i], masks[i], garments[0], 40 + i, match=True) for i in (0, 2)]
    check_equal(found, wanted)
    assert "not made: person_2__garment_1: turn color_match off" in report
    assert not list(output.rglob("*"))


def test_bad_photos_are_named_and_the_others_are_made(bed, singles):
    """An empty mask and a picture that is none: the seeds of the others stay as they were."""
    photos, masks, garments = scenery()
    found, report = run(bed, photos, [masks[0], torch.zeros_like(masks[1]), masks[2]], garments)
    check_equal(found, [singles[i] for i in (0, 1, 4, 5)])
    [line] = [line for line in report.splitlines() if line.startswith("not made: ")]
    assert line.startswith("not made: person_2__garment_1, person_2__garment_2: paint over")
    found, report = run(bed, photos, masks, [garments[0], torch.rand(1, 3, 3, 3)])
    check_equal(found, [singles[i] for i in (0, 2, 4)])
    assert "person_3__garment_2: connect a real picture" in report
    with pytest.raises(FrugalError, match=r"none of the 6 pictures .* person_1__garment_1"):
        run(bed, photos, [torch.zeros_like(mask) for mask in masks], garments)


def test_a_slip_with_a_mask_is_noted_once(bed):
    photos, masks, garments = scenery(garments=2)
    report = run(bed, photos[:1], [1 - masks[0]], garments)[1]
    assert report.count("note: person_1: the mask repaints") == 1


def test_transparent_garments_stand_on_white(bed):
    photos, masks, _ = scenery(persons=((70, 60),))
    black = torch.zeros(1, 40, 30, 3)
    found, _ = run(bed, photos, masks, [black], garment_masks=torch.ones(1, 40, 30))
    check_equal(found, expected(bed, photos, masks, [black + 1]))
    plain, report = run(bed, photos, masks, [black])
    assert (plain[0] - found[0]).abs().max() > 1e-4
    assert "note: garment_1: the garment stands on pure black" in report


def test_a_cancel_stops_and_leaves_nothing(bed, singles, output):
    scene = scenery()
    bent = Exhausted(bed[0])
    plain = bent.step

    def cancel(apply, options):
        if bent.calls == 2:
            comfy.model_management.interrupt_current_processing()
        return plain(apply, options)

    bent.model.set_model_unet_function_wrapper(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run((bent.model, bed[1]), *scene, largest_group=2)
    assert bent.calls < 5, "the batch went on after the cancel"
    assert not list(output.rglob("*"))
    assert not comfy.model_management.processing_interrupted()
    check_equal(run(bed, *scene)[0], singles)


def test_every_sampler_gives_what_it_gives_alone(bed):
    """Those whose noise cannot be kept apart are found out; the usual ones must not be."""
    model, vae = bed
    g = torch.Generator().manual_seed(8)
    picture, mask = torch.rand(2, 64, 32, 3, generator=g), torch.ones(2, 64, 32)
    mask[:, :20] = 0
    levels = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "ddim_uniform", 3
    )

    def sample(sampler, rows, seeds):
        positive, negative, start = glue.conditioning(
            picture[rows], picture[rows].flip(1), mask[rows], vae
        )
        noise = item_noise.start_noise(start["samples"], seeds)
        return comfy.sample.sample_custom(
            model, noise, 2.5, sampler, levels, positive, negative, start["samples"],
            disable_pbar=True, seed=seeds[0],
        )  # fmt: skip

    batched = set()
    for name in comfy.samplers.SAMPLER_NAMES:
        sampler = comfy.samplers.sampler_object(name)
        if not item_noise.can_batch(sampler):
            continue
        batched.add(name)
        together = sample(item_noise.per_item(sampler, [7, 8]), [0, 1], [7, 8])
        for row, seed in ((0, 7), (1, 8)):
            alone = sample(sampler, [row], [seed])[0]
            assert torch.isfinite(alone).all(), name
            error = (together[row] - alone).norm() / alone.norm()
            assert error <= 1e-5, (name, error)
    assert batched >= {"euler", "euler_ancestral", "heun", "dpm_2_ancestral", "lms", "dpmpp_2m"}
    assert batched >= {"lcm", "ddim", "ipndm", "deis"} and "dpmpp_sde" not in batched
    # Guard: without noise of its own the second picture of an ancestral sampler is another one.
    plain = sample(comfy.samplers.sampler_object("euler_ancestral"), [0, 1], [7, 8])
    alone = sample(comfy.samplers.sampler_object("euler_ancestral"), [1], [8])
    assert (plain[1] - alone[0]).norm() / alone.norm() > 1e-2


def test_a_sampler_that_cannot_be_kept_apart_goes_one_by_one(bed):
    scene = scenery(persons=((70, 60), (70, 60)), garments=1)
    levels = comfy.samplers.calculate_sigmas(
        bed[0].get_model_object("model_sampling"), "ddim_uniform", 2
    )
    how = {"sampler": comfy.samplers.sampler_object("dpmpp_sde"), "sigmas": levels}
    found, report = run(bed, *scene, **how)
    assert "groups of 1, 1 " in report and "one by one" in report
    check_equal(found, expected(bed, *scene, **how))


def test_noise_of_its_own_needs_the_patch(bed):
    """Guard: core's own way draws one noise for the whole batch, which is what must not happen."""
    latent = torch.zeros(2, 4, 24, 8)
    rows = item_noise.start_noise(latent, [5, 6])
    assert torch.equal(rows[1], item_noise.start_noise(latent[:1], [6])[0])
    assert not torch.equal(rows[1], comfy.sample.prepare_noise(latent, 5)[1])
    assert item_noise.seed_of(2**64 - 1, 1) == 0


def test_what_does_not_fit_together_is_refused_before_any_work(bed):
    photos, masks, garments = scenery()
    for given, match in (
        ({"masks": masks[:2]}, "2 masks for 3 persons"),
        ({"combine": batching.PAIRS}, "3 persons and 2 garments"),
        ({"width": [64, 64]}, "list of 2 for 3 persons"),
        ({"sampler": comfy.samplers.sampler_object("euler")}, "sigmas is not connected"),
        ({"garments": []}, "0 garments"),
    ):
        call = {"photos": photos, "masks": masks, "garments": garments, **given}
        bent = Exhausted(bed[0])
        with pytest.raises(FrugalError, match=match):
            run((bent.model, bed[1]), **call)
        assert bent.calls == 0
    plain = bed[0].clone()
    plain.model = type("Plain", (), {"concat_keys": ()})()
    with pytest.raises(FrugalError, match="Load CatVTON"):
        run((plain, bed[1]), photos, masks, garments, sampler=object(), sigmas=torch.ones(2))
