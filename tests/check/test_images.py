"""What a model takes, read off models of every library; labelled images from folders and from .npz."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sw_transplant.check.images import ArrayImages, load_images
from sw_transplant.check.model_input import IMAGENET_MEAN, IMAGENET_STD, ModelInput

RNG = np.random.default_rng(0)
SMALL = ModelInput(shape=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.4))


def pixels(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of 3 and 2 images, of one colour each (red tells which), and what is no image."""
    for name, reds in (("b_cat", (40, 50)), ("a_dog", (10, 20, 30))):
        (tmp_path / name / "more").mkdir(parents=True)
        for index, red in enumerate(reds):
            inside = tmp_path / name / ("more" if index == 1 else "")
            Image.new("RGB", (20, 12), (red, 0, 255)).save(inside / f"{red}.PNG")
        (tmp_path / name / "notes.txt").write_text("no image")
    (tmp_path / "README.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def reds(batches, model_input=SMALL) -> list[int]:
    mean, std = model_input.mean[0], model_input.std[0]
    return [round(float(red * std + mean) * 255) for images, _ in batches for red in images[:, 0, 0, 0]]


# ---- what a model takes


def test_plain_models_take_224_and_the_channels_of_the_first_conv():
    assert ModelInput.of(nn.Linear(2, 2)) == ModelInput()
    assert ModelInput().shape == (3, 224, 224)
    deep = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    taken = ModelInput.of(deep)
    assert taken.shape == (1, 224, 224)
    assert taken.mean == (pytest.approx(sum(IMAGENET_MEAN) / 3),)
    deep.num_classes = 7
    assert ModelInput.of(deep).num_classes == 7
    deep.num_classes = 0
    assert ModelInput.of(deep).num_classes is None


@pytest.mark.parametrize("attribute", ["pretrained_cfg", "default_cfg"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_timm_config_of_the_model_or_of_one_inside(attribute, wrapped):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    setattr(model, attribute, {"input_size": (3, 96, 80), "mean": [0.5, 0.5, 0.5], "std": (0.2, 0.3, 0.4)})
    taken = ModelInput.of(nn.Sequential(model) if wrapped else model)
    assert taken.shape == (3, 96, 80)
    assert taken.mean == (0.5, 0.5, 0.5)
    assert taken.std == (0.2, 0.3, 0.4)


@pytest.mark.parametrize(("stem", "channels"), [(1, 1), (4, 4), (48, 3)])
def test_stem_tells_other_channels_unless_it_takes_pixels_as_channels(stem, channels):
    model = nn.Conv2d(stem, 8, 3)
    model.pretrained_cfg = {"input_size": (3, 96, 96)}
    assert ModelInput.of(model).shape == (channels, 96, 96)


def test_timm_models():
    timm = pytest.importorskip("timm")
    from timm.models import PretrainedCfg

    for options in ({}, {"features_only": True}):
        assert ModelInput.of(timm.create_model("test_convnext", **options)).shape == (3, 160, 160)
    grey = timm.create_model("test_convnext", in_chans=1, num_classes=5)
    taken = ModelInput.of(grey)
    assert (taken.shape, taken.num_classes, len(taken.mean)) == ((1, 160, 160), 5, 1)
    grey.pretrained_cfg = PretrainedCfg(input_size=(3, 64, 64))  # the dataclass form
    assert ModelInput.of(grey).shape == (1, 64, 64)


def test_hugging_face_configs():
    transformers = pytest.importorskip("transformers")
    tiny = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2}
    for size, expected in ((48, (48, 48)), ((40, 56), (40, 56)), ([40, 56], (40, 56))):
        config = transformers.ConvNextConfig(**tiny, num_labels=5, num_channels=4)
        config.image_size = size
        taken = ModelInput.of(transformers.ConvNextForImageClassification(config))
        assert taken.shape == (4, *expected)
        assert taken.num_classes == 5
        assert ModelInput.of(transformers.ConvNextModel(config)).num_classes is None
    model = nn.Conv2d(3, 3, 1)
    model.config = transformers.PreTrainedConfig()
    model.config.backbone_config = transformers.ConvNextConfig(**tiny, image_size=72, num_channels=2)
    assert ModelInput.of(model).shape == (2, 72, 72)


def test_timm_inside_hugging_face():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(architecture="test_convnext", num_labels=4)
    model = transformers.TimmWrapperForImageClassification(config)
    taken = ModelInput.of(model)
    assert (taken.shape, taken.num_classes) == ((3, 160, 160), 4)
    model.config.pretrained_cfg = {"input_size": [3, 200, 200]}
    assert ModelInput.of(model).shape == (3, 200, 200)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"size": 30}, (3, 30, 30)),
        ({"size": {"height": 20, "width": 24}}, (3, 20, 24)),
        ({"size": {"shortest_edge": 28}, "crop_pct": 0.875}, (3, 28, 28)),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 36}},
            (3, 32, 36),
        ),
        ({"size": {"shortest_edge": 40}, "do_center_crop": False, "crop_size": 32}, (3, 40, 40)),
        ({}, (3, 224, 224)),
    ],
)
def test_processor_sizes(tmp_path, settings, shape):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    taken = ModelInput.of(nn.Conv2d(3, 4, 1), tmp_path)
    assert taken.shape == shape
    assert taken.mean == (0.1, 0.2, 0.3)
    assert taken.std == IMAGENET_STD


def test_processor_without_normalisation(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]})
    )
    taken = ModelInput.of(nn.Conv2d(3, 4, 1), tmp_path)
    assert (taken.mean, taken.std) == ((0, 0, 0), (1, 1, 1))


def test_processor_errors(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*preprocessor_config\.json"):
        ModelInput.of(nn.Conv2d(3, 4, 1), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 30}}))
    with pytest.raises(ValueError, match=r"image size .*longest_edge.* is not understood"):
        ModelInput.of(nn.Conv2d(3, 4, 1), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (3, 0, 8)}, r"shape is \(3, 0, 8\)"),
        ({"shape": (8, 8)}, r"shape is \(8, 8\)"),
        ({"mean": (0.5,)}, "mean has 1 numbers and the images have 3 channels"),
        ({"shape": (1, 8, 8)}, "mean has 3 numbers and the images have 1 channels"),
    ],
)
def test_model_input_checks_itself(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelInput(**fields)


# ---- preprocessing of one image file


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (256, 256), (100, 80)])
def test_plain_preprocessing_is_timms(size):
    transforms = pytest.importorskip("timm.data.transforms_factory")
    image = Image.fromarray(pixels(1, *size)[0])
    ours = ModelInput(shape=(3, 224, 224)).transform()(image)
    theirs = transforms.create_transform(224, interpolation="bilinear", crop_pct=224 / 256)(image)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_plain_preprocessing_of_other_shapes():
    image = Image.new("L", (50, 90), 51)
    ours = ModelInput(shape=(1, 24, 40), mean=(0.1,), std=(0.5,)).transform()(image)
    torch.testing.assert_close(ours, torch.full((1, 24, 40), 0.2))


def test_timm_models_get_timms_preprocessing():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_convnext")
    model.pretrained_cfg |= {"crop_pct": 0.7, "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5)}
    image = Image.fromarray(pixels(1, 300, 200)[0])
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)
    torch.testing.assert_close(ModelInput.of(model).transform()(image), expected, rtol=0, atol=0)


def test_grey_timm_models_get_grey_images():
    timm = pytest.importorskip("timm")
    image = Image.new("L", (200, 200), 51)
    model = timm.create_model("test_convnext", in_chans=1)
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.5, 0.8)}
    x = ModelInput.of(model).transform()(image)
    torch.testing.assert_close(x, torch.full((1, 160, 160), (0.2 - 0.2) / 0.5), atol=1e-6, rtol=0)
    model.pretrained_cfg |= {"mean": (0.3, 0.4, 0.5)}
    x = ModelInput.of(model).transform()(image)
    torch.testing.assert_close(x, torch.full((1, 160, 160), (0.2 - 0.4) / 0.5))


def test_hugging_face_preprocessing_of_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 32}, crop_pct=0.5, image_mean=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(pixels(1, 80, 60)[0])
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    taken = ModelInput.of(nn.Conv2d(3, 4, 1), tmp_path)
    assert taken.shape == tuple(expected.shape) == (3, 32, 32)
    torch.testing.assert_close(taken.transform()(image), expected, rtol=0, atol=0)


# ---- folders


def test_folder_of_classes(folder):
    data = load_images(folder, SMALL, batch_size=2)
    for _ in range(2):  # again and again
        batches = list(data)
        assert [images.shape for images, _ in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1]
        assert sorted(reds(batches)[:3]) == [10, 20, 30]
        assert sorted(reds(batches)[3:]) == [40, 50]
    assert batches[0][0].dtype == torch.float32
    torch.testing.assert_close(batches[0][0][0, 2], torch.full((8, 8), (1 - 0.3) / 0.4))
    assert len(data) == 3


def test_folder_is_read_by_worker_processes(folder):
    assert reds(load_images(folder, SMALL, workers=1)) == reds(load_images(folder, SMALL))


def test_grey_folder(folder):
    grey = ModelInput(shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    assert next(iter(load_images(folder, grey)))[0].shape == (5, 1, 8, 8)


def test_classes_number_the_folders(folder):
    three = ModelInput(shape=(3, 8, 8), num_classes=3)
    data = load_images(folder, three, classes=["b_cat", "eel", "a_dog"])
    assert torch.cat([labels for _, labels in data]).tolist() == [2, 2, 2, 0, 0]


def test_limit_is_spread_over_the_classes(folder):
    data = load_images(folder, SMALL, limit=2)
    assert torch.cat([labels for _, labels in data]).tolist() == [0, 0]
    data = load_images(folder, SMALL, limit=3)
    assert torch.cat([labels for _, labels in data]).tolist() == [0, 0, 1]
    assert len(reds(load_images(folder, SMALL, limit=99))) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_input": ModelInput(num_classes=1000)}, "has 2 classes and the model has 1000"),
        ({"classes": ["a_dog"]}, r"the folders \['b_cat'\] .* are not in classes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_folder_errors(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(folder, **options)


def test_folder_for_five_channels(folder):
    with pytest.raises(NotImplementedError, match="takes 5 channels; image files give 1 or 3"):
        load_images(folder, ModelInput(shape=(5, 8, 8), mean=(0.0,) * 5, std=(1.0,) * 5))


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no images in .* or in the class folders of .* \(0 of them\)"):
        load_images(tmp_path)
    (tmp_path / "empty class").mkdir()
    with pytest.raises(ValueError, match=r"no images in .* or in the class folders of .* \(1 of them\)"):
        load_images(tmp_path)
    (tmp_path / "images.tar").write_text("")
    with pytest.raises(ValueError, match="neither a folder nor an"):
        load_images(tmp_path / "images.tar")


def test_folder_of_images_alone(tmp_path):
    for red in (10, 20, 30):
        Image.new("RGB", (20, 12), (red, 0, 255)).save(tmp_path / f"{red}.png")
    batches = list(load_images(tmp_path, SMALL, batch_size=2))
    assert [tuple(images.shape) for images in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert reds((images, None) for images in batches) == [10, 20, 30]
    with pytest.raises(ValueError, match="has none with images; leave classes out"):
        load_images(tmp_path, SMALL, classes=["a"])


def test_labels_left_out(folder):
    (images,) = load_images(folder, ModelInput(shape=(3, 8, 8), num_classes=1000), labels=False)
    assert images.shape == (5, 3, 8, 8)
    with pytest.raises(ValueError, match="leave one of them out"):
        load_images(folder, SMALL, labels=False, classes=["a_dog", "b_cat"])


def test_images_beside_class_folders_are_not_passed_over(folder):
    Image.new("RGB", (20, 12)).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"1 images beside its class folders \(loose.png\)"):
        load_images(folder, SMALL)
    (images,) = load_images(folder, SMALL, labels=False)
    assert len(images) == 6


def test_images_of_their_own_size(tmp_path):
    for index, size in enumerate([(20, 12), (20, 12), (9, 5), (20, 12), (20, 12), (20, 12)]):
        Image.new("RGB", size, (51, 0, 255)).save(tmp_path / f"{index}.png")
    batches = list(load_images(tmp_path, SMALL, batch_size=2, resize=False))
    assert [tuple(images.shape) for images in batches] == [(2, 3, 12, 20), (1, 3, 5, 9), (2, 3, 12, 20), (1, 3, 12, 20)]
    torch.testing.assert_close(batches[1][0, 0], torch.full((5, 9), (0.2 - SMALL.mean[0]) / SMALL.std[0]))


# ---- arrays


def test_arrays_of_their_own_size_and_without_labels(tmp_path):
    file = save(tmp_path / "a.npz", images=pixels(2, 5, 7), labels=np.arange(2))
    ((images, labels),) = load_images(file, SMALL, resize=False)
    assert (tuple(images.shape), labels.tolist()) == ((2, 3, 5, 7), [0, 1])
    (images,) = load_images(file, SMALL, labels=False)
    assert tuple(images.shape) == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="classes name folders"):
        load_images(file, SMALL, classes=["a"])


def test_uint8_images_are_scaled_and_normalised(tmp_path):
    images = pixels(5)
    data = load_images(
        save(tmp_path / "a.npz", images=images, labels=np.arange(5, dtype=np.uint8)), SMALL, batch_size=2
    )
    expected = (images.transpose(0, 3, 1, 2) / 255.0 - np.reshape(SMALL.mean, (3, 1, 1))) / np.reshape(
        SMALL.std, (3, 1, 1)
    )
    for _ in range(2):
        batches = list(data)
        assert len(batches) == len(data) == 3
        got = torch.cat([x for x, _ in batches])
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
        labels = torch.cat([y for _, y in batches])
        assert labels.tolist() == list(range(5))
        assert labels.dtype == torch.int64


def test_arrays_in_the_npz_replace_mean_and_std(tmp_path):
    images = pixels(2)
    file = save(tmp_path / "a.npz", images=images, mean=np.array([0.0, 0.5, 1.0]), std=np.array([1.0, 2.0, 4.0]))
    (got,) = load_images(file, SMALL)
    expected = (images.transpose(0, 3, 1, 2) / 255.0 - np.reshape([0, 0.5, 1], (3, 1, 1))) / np.reshape(
        [1, 2, 4], (3, 1, 1)
    )
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_uint8_images_are_resized_when_the_size_differs(tmp_path):
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, :, 1] = 255
    plain = ModelInput(shape=(3, 4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    (got,) = load_images(save(tmp_path / "a.npz", images=images), plain)
    # Bilinear without aligned corners: sample points at -0.25, 0.25, 0.75 and 1.25 pixels.
    torch.testing.assert_close(got[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_float_images_are_taken_as_they_are(tmp_path):
    images = RNG.standard_normal((3, 3, 5, 6)).astype(np.float32)
    (got,) = load_images(save(tmp_path / "a.npz", images=images), SMALL)
    np.testing.assert_array_equal(got.numpy(), images)


def test_npz_limit_is_spread(tmp_path):
    file = save(tmp_path / "a.npz", images=pixels(10), labels=np.arange(10))
    ((_, labels),) = load_images(file, SMALL, limit=5)
    assert labels.tolist() == [0, 2, 4, 6, 8]


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.arange(2)}, "has no array 'images'"),
        ({"images": IMAGES[:0]}, r"uint8 of shape \(0, 8, 8, 3\)"),
        ({"images": IMAGES[0]}, r"uint8 of shape \(8, 8, 3\)"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"uint8 of shape \(2, 3, 8, 8\); .* uint8 \(N, H, W, 3\)"),
        ({"images": IMAGES.astype(np.float32)}, r"float32 of shape \(2, 8, 8, 3\)"),
        ({"images": IMAGES.astype(np.float64)}, "float64 of shape"),
        ({"images": IMAGES, "labels": np.arange(3)}, r"'labels' .* of shape \(3,\)"),
        ({"images": IMAGES, "labels": np.zeros((2, 10), int)}, r"'labels' .* of shape \(2, 10\)"),
        ({"images": IMAGES, "labels": np.zeros(2)}, "'labels' .* is float64"),
        ({"images": IMAGES, "labels": np.array([0, 10])}, "run from 0 to 10; expected 0 or more, below the model's 10"),
        ({"images": IMAGES, "labels": np.array([-1, 1])}, "run from -1 to 1"),
        ({"images": IMAGES, "mean": np.zeros(2)}, r"'mean' .* has shape \(2,\)"),
        ({"images": np.zeros((1, 3, 8, 8), np.float32), "std": np.ones(3)}, "'std' .* float32 images"),
        ({"images": np.array([None])}, "cannot be read as an .npz of plain arrays"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load_images(save(tmp_path / "a.npz", **arrays), ModelInput(shape=(3, 8, 8), num_classes=10))


def test_unreadable_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        load_images(tmp_path / "a.npz")


def test_labels_of_an_unknown_number_of_classes(tmp_path):
    file = save(tmp_path / "a.npz", images=IMAGES, labels=np.array([0, 12345]))
    assert isinstance(load_images(file, SMALL), ArrayImages)


def test_cifar10_sample(shared):
    taken = ModelInput((3, 96, 96), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), num_classes=10)
    data = load_images(shared / "data" / "cifar10_test_1000.npz", taken, batch_size=250)
    means, labels = [], []
    for x, y in data:
        assert x.shape == (250, 3, 96, 96)
        means.append(x.mean((0, 2, 3)))
        labels.append(y)
    # The mean and std are those of CIFAR-10 itself, so the sample is close to zero mean.
    assert torch.stack(means).mean(0).abs().max() < 0.1
    assert torch.cat(labels).bincount().tolist() == [100] * 10
