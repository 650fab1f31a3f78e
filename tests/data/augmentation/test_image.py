"""Augmented images and mixed labels: functions of (seed, epoch, id) and of nothing else, and torchvision's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from data import DataError, MicroBatching, training_steps
from data.augmentation.image import ImageAugmentation, Mix, choose_mix, seeded
from data.image_classification import ImageExamples, save_augmented_images
from data.image_preprocessing import Preprocessing, normalize, resize_and_crop
from models import ModelError
from models.heads import HeadShape, classification_loss

PREPROCESSING = Preprocessing((16, 16), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3, tokens=5)
ALL = {
    "random_crop_min_scale": 0.3,
    "horizontal_flip": 0.5,
    "rotation_degrees": 20.0,
    "color_jitter": 0.4,
    "auto_augment": "randaugment",
    "random_erasing": 0.5,
}
MIXED = ALL | {"mixup": 0.8, "cutmix": 1.0}


def examples(count=12, size=20, num_labels=3, **augmentation) -> ImageExamples:
    rng = np.random.default_rng(0)
    return ImageExamples(
        images=rng.integers(0, 256, (count, size, size), dtype=np.uint8),
        digests=[""] * count,
        labels=rng.integers(0, num_labels, count),
        ids=[f"img-{7 * i}" for i in range(count)],
        preprocessing=PREPROCESSING,
        num_labels=num_labels,
        augmentation=ImageAugmentation(seed=3, **augmentation) if augmentation else None,
    )


def assert_same(ours, theirs):
    assert torch.equal(ours.pixel_values, theirs.pixel_values)
    assert torch.equal(ours.labels, theirs.labels)
    assert (ours.ids, ours.indices, ours.num_targets) == (theirs.ids, theirs.indices, theirs.num_targets)


# What an augmented image depends on


@pytest.mark.parametrize(
    "settings", [ALL, MIXED, ALL | {"auto_augment": "trivialaugment"}], ids=["plain", "mixed", "trivial"]
)
def test_an_image_depends_on_seed_epoch_and_id_alone(settings):
    ours = examples(**settings)
    whole = ours.batch(range(12), epoch=2)
    torch.manual_seed(9)  # not on the global state
    for i in reversed(range(12)):  # nor on the order, nor on its company
        alone = ours.batch([i], epoch=2)
        assert torch.equal(alone.pixel_values[0], whole.pixel_values[i])
        assert torch.equal(alone.labels[0], whole.labels[i])
    others = [
        ours.batch(range(12), epoch=3),
        replace(ours, augmentation=replace(ours.augmentation, seed=4)).batch(range(12), epoch=2),
        replace(ours, ids=[f"x{i}" for i in range(12)]).batch(range(12), epoch=2),
    ]
    for other in others:
        changed = (other.pixel_values != whole.pixel_values).flatten(1).any(1)
        assert changed.sum() >= 11


def test_drawing_leaves_the_global_state_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    examples(**MIXED).batch(range(12), epoch=0)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError), seeded(1, 2, "x"):
        torch.rand(-1)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_sees_the_images_as_they_are():
    assert_same(examples(**MIXED).batch(range(12)), examples().batch(range(12)))
    assert_same(examples().batch(range(12), epoch=1), examples().batch(range(12)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limits", [{}, {"max_examples": 2}, {"max_tokens": 15}])
def test_p04_a_step_has_the_same_images_in_every_process(workers, limits):
    """Steps 0 to 6 of 5 images, into the third epoch, of one pass against runs that begin at step 4."""
    ours = examples(**MIXED)
    through = training_steps(ours, 5, 0, MicroBatching())
    whole = [torch.cat([b.pixel_values for b in next(through)]) for _ in range(7)]
    resumed = training_steps(ours, 5, 0, MicroBatching(**limits), start=4, num_workers=workers)
    for step in range(4, 7):
        assert torch.equal(torch.cat([b.pixel_values for b in next(resumed)]), whole[step])


# The operations are torchvision's


@pytest.mark.parametrize(
    ("settings", "transform"),
    [
        ({"horizontal_flip": 1.0}, v2.RandomHorizontalFlip(1.0)),
        ({"rotation_degrees": 30.0}, v2.RandomRotation(30.0, interpolation=v2.InterpolationMode.BILINEAR)),
        ({"color_jitter": 0.4}, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)),
        ({"auto_augment": "randaugment"}, v2.RandAugment()),
        ({"auto_augment": "trivialaugment"}, v2.TrivialAugmentWide()),
    ],
)
def test_one_operation_is_the_transform_of_torchvision(settings, transform):
    pixels = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    ours = ImageAugmentation(3, **settings).apply(pixels, PREPROCESSING, 1, "a")
    with seeded(3, 1, "a"):
        expected = normalize(transform(resize_and_crop(pixels, PREPROCESSING)), PREPROCESSING)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, normalize(resize_and_crop(pixels, PREPROCESSING), PREPROCESSING))


def test_a_crop_is_of_the_image_and_has_the_size_of_the_model():
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    pixels[0] = torch.arange(40) * 6  # red says the column, green the row
    pixels[1] = torch.arange(40)[:, None] * 6
    crops = [
        ImageAugmentation(0, random_crop_min_scale=0.2).apply(pixels, PREPROCESSING, epoch, "a") for epoch in range(50)
    ]
    assert {x.shape for x in crops} == {(3, 16, 16)}
    widths = torch.stack([(x[0, 0, -1] - x[0, 0, 0]) for x in crops])
    heights = torch.stack([(x[1, -1, 0] - x[1, 0, 0]) for x in crops])
    areas = (widths * heights) / (2 * 240 / 255) ** 2  # with half a column less at each edge
    assert 0.1 < areas.min() < 0.35
    assert areas.max() > 0.7


def test_erasing_takes_the_mean_colour():
    pixels = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    x = ImageAugmentation(0, random_erasing=1.0).apply(pixels, PREPROCESSING, 0, "a")
    share = (x == 0).float().mean()
    assert 0 < share < 0.4
    assert torch.equal((x == 0) | (x == 1), torch.ones_like(x, dtype=torch.bool))


def test_grey_images_take_all_operations():
    grey = replace(PREPROCESSING, mean=(0.5,), std=(0.5,))
    for policy in ("randaugment", "trivialaugment"):
        augmentation = ImageAugmentation(0, **ALL | {"auto_augment": policy})
        for epoch in range(40):  # each draws other operations
            x = augmentation.apply(torch.randint(0, 256, (1, 20, 20), dtype=torch.uint8), grey, epoch, "a")
            assert x.shape == (1, 16, 16)
            assert x.isfinite().all()


# Mixtures


def test_mixup_is_a_mean_and_its_labels_have_the_same_shares():
    ours = examples(mixup=1.0)
    plain, mixed = ours.batch(range(12)), ours.batch(range(12), epoch=4)
    assert mixed.labels.dtype == torch.float32
    for i in range(12):
        mix = choose_mix(ours.augmentation, 4, ours.ids[i], 12)
        x, other = plain.pixel_values[i], plain.pixel_values[mix.partner]
        torch.testing.assert_close(mixed.pixel_values[i], mix.share * x + (1 - mix.share) * other)
        shares = torch.zeros(3).index_add_(
            0, plain.labels[[i, mix.partner]], torch.tensor([mix.share, 1 - mix.share], dtype=torch.float32)
        )
        torch.testing.assert_close(mixed.labels[i], shares)


def test_cutmix_is_a_rectangle_with_its_share_in_pixels():
    ours = examples(cutmix=1.0)
    plain, mixed = ours.batch(range(12)), ours.batch(range(12), epoch=1)
    for i in range(12):
        mix = choose_mix(ours.augmentation, 1, ours.ids[i], 12)
        x, other = plain.pixel_values[i], plain.pixel_values[mix.partner]
        _, share = mix.blend(x, other)
        taken = (mixed.pixel_values[i] != x).any(0)
        if mix.partner != i:
            assert taken.float().mean().item() == pytest.approx(1 - share, abs=0.02)  # a pixel can be equal by chance
        rows, columns = taken.any(1).nonzero().flatten(), taken.any(0).nonzero().flatten()
        if len(rows):
            box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            assert torch.equal(mixed.pixel_values[i][box], other[box])
        assert mixed.labels[i].sum().item() == pytest.approx(1)


def test_a_mixture_of_both_ends():
    x, other = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    assert Mix(0, 0.25, False, (0, 0)).blend(x, other)[0].unique().tolist() == [0.75]
    corner, share = Mix(0, 0.75, True, (0.0, 0.0)).blend(x, other)  # half a side, of which half lies outside
    assert share == 1 - 4 / 64
    assert corner.sum() == 4
    assert torch.equal(Mix(0, 1.0, True, (0.5, 0.5)).blend(x, other)[0], x)
    assert torch.equal(Mix(0, 0.0, True, (0.5, 0.5)).blend(x, other)[0], other)


def test_partners_and_kinds_are_spread():
    mixes = [
        choose_mix(ImageAugmentation(0, mixup=1.0, cutmix=1.0), e, f"i{i}", 10) for e in range(20) for i in range(50)
    ]
    partners = np.bincount([mix.partner for mix in mixes], minlength=10)
    assert partners.min() > 70
    assert 400 < sum(mix.is_cutmix for mix in mixes) < 600
    assert 0.45 < np.mean([mix.share for mix in mixes]) < 0.55
    assert choose_mix(ImageAugmentation(0, mixup=1.0), 0, "only", 1) is None


def test_a_single_image_and_no_image_mix_with_nothing():
    one = examples(count=1, mixup=1.0)
    assert one.batch([0], epoch=0).labels.sum() == 1
    empty = examples(**MIXED).batch([], epoch=0)
    assert (empty.pixel_values.shape, empty.labels.shape, empty.num_targets) == ((0, 3, 16, 16), (0, 3), 0)
    assert empty.labels.dtype == torch.float32


# The loss of shares


def shape_of(smoothing=0.0):
    return HeadShape(4, num_labels=5, label_smoothing=smoothing)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_of_shares_is_that_of_torch(dtype, smoothing, training):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator).to(dtype).requires_grad_()
    shares = torch.rand(6, 5, generator=generator).softmax(-1)
    ours = classification_loss(logits, shares, shape_of(smoothing), training)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    used = smoothing if training else 0.0
    expected = F.cross_entropy(wide, shares.to(wide.dtype), reduction="sum", label_smoothing=used)
    assert ours.dtype == wide.dtype
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_shares_of_one_class_and_rows_of_nan(smoothing):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    shares = F.one_hot(labels, 5).float()
    shares[3] = float("nan")
    labels[3] = -100
    ours, expected = (classification_loss(logits, x, shape_of(smoothing), True) for x in (shares, labels))
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_shares_of_no_image_cost_nothing_and_keep_the_graph():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = classification_loss(logits, torch.zeros(0, 5), shape_of(0.1), True)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 5)


def test_shares_of_another_number_of_classes_are_refused():
    with pytest.raises(
        ModelError, match=r"single-label labels of shape \[2\] should have the shape of the logits, \[2, 5\]"
    ):
        classification_loss(torch.zeros(2, 5), torch.zeros(2), shape_of(), True)


# The sheet


def test_the_sheet_has_a_line_for_each_image(tmp_path):
    save_augmented_images(examples(**MIXED), tmp_path / "sheet.png", count=4, epochs=3)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (4 * 20, 4 * 20)
        first = np.asarray(picture)[:16, :16]
    expected = examples().batch([0]).pixel_values[0] * 0.5 + 0.5
    assert np.array_equal(first, (expected * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    with pytest.raises(DataError, match="no images to show"):
        save_augmented_images(examples(count=0), tmp_path / "none.png")
