"""preprocessor_config.json and the tensor it makes of an image, against transformers' image processors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.image_preprocessing import FILE, Preprocessing, preprocess, read_preprocessing

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# (class of transformers without "ImageProcessor", settings that differ from its defaults)
PROCESSORS = [
    ("ViT", {}),
    ("ViT", {"size": {"height": 30, "width": 45}, "resample": 3}),
    ("ViT", {"do_resize": False, "do_rescale": False}),
    ("ViT", {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}),
    ("ViT", {"do_normalize": False}),
    ("DeiT", {}),
    ("DeiT", {"size": {"height": 31, "width": 31}, "crop_size": {"height": 24, "width": 40}, "resample": 2}),
    ("Bit", {"size": {"shortest_edge": 256}}),
    ("Bit", {"size": {"shortest_edge": 256}, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}),  # DINOv2's
    ("Beit", {}),
    ("Beit", {"size": {"height": 256, "width": 256}, "do_center_crop": True, "resample": 2}),  # in older files
    ("Beit", {"do_reduce_labels": True, "size": {"height": 40, "width": 40}}),
    ("Bit", {"size": {"shortest_edge": 25}, "crop_size": {"height": 18, "width": 60}}),
]
SIZES = [(48, 64), (64, 37), (224, 224), (90, 301)]


def picture(height, width, mode="RGB"):
    """Half smooth, half noise."""
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    smooth = Image.fromarray(pixels[:8, :8].squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    pixels[:, : width // 2] = np.asarray(smooth).reshape(pixels.shape)[:, : width // 2]
    return Image.fromarray(pixels.squeeze())


def write(folder, **settings):
    (folder / FILE).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "settings"), PROCESSORS)
def test_a_picture_becomes_the_tensor_of_transformers(tmp_path, name, settings, size):
    """Exact, but for the order of the arithmetic, to its torchvision processors, the default ones."""
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name}ImageProcessor")(**settings)
    processor.save_pretrained(tmp_path)
    preprocessing = read_preprocessing(tmp_path)
    image = picture(*size)
    expected = processor(images=image, return_tensors="pt").pixel_values[0].float()
    torch.testing.assert_close(preprocess(image, preprocessing), expected, rtol=1e-6, atol=1e-6)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(preprocess(pixels, preprocessing), preprocess(image, preprocessing))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [2, 3])
def test_the_filters_are_pillows_but_for_rounding(tmp_path, resample, size):
    """Published numbers were often made with Pillow: bilinear is within one grey level, bicubic too, but for noise."""
    preprocessing = read_preprocessing(write(tmp_path, size=24, resample=resample))
    image = picture(*size)
    expected = torch.from_numpy(np.array(image.resize((24, 24), Image.Resampling(resample)))).permute(2, 0, 1)
    levels = (preprocess(image, preprocessing) * 0.5 + 0.5) * 255
    difference = (levels - expected).abs()
    assert difference.max() < (1.01 if resample == 2 else 4.01)
    assert difference.mean() < 0.5


def test_the_names_of_older_files(tmp_path):
    old = write(tmp_path, feature_extractor_type="DeiTFeatureExtractor", size=40, crop_size=32, resample=3)
    assert read_preprocessing(old) == Preprocessing((40, 40), 3, (32, 32), 1 / 255, (0.5,) * 3, (0.5,) * 3)
    assert read_preprocessing(write(tmp_path)).size == (224, 224)  # a ViT's, where nothing is said
    assert read_preprocessing(write(tmp_path, image_processor_type="BitImageProcessor", size=40)).size == 40


def test_pictures_of_other_modes(tmp_path):
    preprocessing = read_preprocessing(write(tmp_path, size=8))
    grey = picture(20, 20, "L")
    assert torch.equal(preprocess(grey, preprocessing), preprocess(grey.convert("RGB"), preprocessing))
    one = read_preprocessing(write(tmp_path, size=8, image_mean=[0.5], image_std=[0.5]))
    assert preprocess(picture(20, 20), one).shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"should be uint8 \(3, height, width\)"):
        preprocess(torch.zeros(3, 8, 8), preprocessing)
    with pytest.raises(DataError, match=r"shape \[1, 8, 8\]"):
        preprocess(torch.zeros(1, 8, 8, dtype=torch.uint8), preprocessing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "'CLIPImageProcessor' is not supported; choose from ViT, DeiT",
        ),
        ({"size": {"longest_edge": 5}}, "should have height and width, or shortest_edge"),
        ({"size": {"height": 5}}, "should have height and width, or shortest_edge"),
        ({"size": 0}, "size = 0 should be in whole pixels"),
        ({"size": [1, 2, 3]}, "should be in whole pixels"),
        ({"size": True}, "should be in whole pixels"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 5}}, "crop_size = .* should have height and width"),
        ({"resample": 1}, r"resample = 1 is not supported; 2 \(bilinear\) and 3 \(bicubic\) are"),
        ({"do_pad": True}, "do_pad = True is not supported"),
        ({"crop_pct": 0.9}, "crop_pct = 0.9 is not supported"),
        ({"image_mean": 0.5}, "image_mean = 0.5 should be a list"),
        ({"image_std": [1, 1, 0]}, "no image_std of 0"),
        ({"rescale_factor": "x"}, "rescale_factor = 'x' should be a number"),
        ({"image_std": ["x"]}, "image_std = .* should be a list"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(tmp_path, settings, message):
    with pytest.raises(DataError, match=message) as error:
        read_preprocessing(write(tmp_path, **settings))
    assert FILE in str(error.value)


def test_a_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match=f"no {FILE}"):
        read_preprocessing(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        read_preprocessing(tmp_path)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(DataError, match="should be an object"):
        read_preprocessing(tmp_path)
