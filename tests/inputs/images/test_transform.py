import numpy as np
import pytest
import torch
from PIL import Image

from ooc_ntk.inputs.images.geometry import Geometry, crop_box
from ooc_ntk.inputs.images.transform import arrange_pixels, open_photo, to_inputs


def triangle_weights(before: int, after: int) -> np.ndarray:
    """Weights (after, before) of bilinear resizing with antialiasing: a triangle as wide as the reduction."""
    scale = before / after
    support = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    distances = np.abs(np.arange(before) + 0.5 - centres[:, None]) / support
    weights = np.maximum(1 - distances, 0)
    return weights / weights.sum(1, keepdims=True)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = triangle_weights(pixels.shape[1], height)
    columns = triangle_weights(pixels.shape[2], width)
    return np.einsum("hr,crw,vw->chv", rows, pixels.astype(np.float64), columns)


def noise(*shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(3)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((30, 41), 16, (16, 21)),  # 16 · 41 / 30 = 21.87, cut
        ((41, 30), 16, (21, 16)),
        ((28, 28), 32, (32, 32)),
        ((20, 50), (31, 17), (31, 17)),
        ((20, 50), 20, (20, 50)),
    ],
)
def test_resize_is_bilinear_with_antialiasing(channels, size, resize, expected):
    pixels = noise(channels, *size)
    found = arrange_pixels(pixels, Geometry(resize))
    assert found.shape == (channels, *expected)
    assert Geometry(resize).output(*size) == expected
    # PIL rounds to bytes after each of its two passes.
    assert np.abs(found - resized(pixels, *expected)).max() <= 1.01


def test_centre_crop_takes_the_rows_that_torchvision_takes():
    pixels = noise(3, 9, 12)
    # (9 − 4) / 2 = 2.5 rounds to 2, (12 − 5) / 2 = 3.5 rounds to 4: to even.
    assert np.array_equal(arrange_pixels(pixels, Geometry(crop=(4, 5))), pixels[:, 2:6, 4:9])
    assert np.array_equal(arrange_pixels(pixels, Geometry(crop=(9, 12))), pixels)


def test_a_crop_larger_than_the_image_is_padded_with_zeros():
    pixels = noise(1, 3, 10) | 1
    expected = np.zeros((1, 6, 4), np.uint8)
    expected[:, 1:4] = pixels[:, :, 3:7]  # 3 rows missing: one above, two below
    assert np.array_equal(arrange_pixels(pixels, Geometry(crop=(6, 4))), expected)
    assert crop_box(3, 10, (6, 4)) == (3, -1, 7, 5)


def test_resize_then_crop():
    pixels = noise(3, 30, 45)
    found = arrange_pixels(pixels, Geometry(20, 16))
    whole = arrange_pixels(pixels, Geometry(20))
    assert whole.shape == (3, 20, 30)
    assert np.array_equal(found, whole[:, 2:18, 7:23])


def test_inputs_are_scaled_and_normalised_per_channel():
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    found = to_inputs(pixels, 3, ((0.5, 0.1, 0.25), (0.5, 0.2, 0.125)))
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([-1.0, 0.5, 6.0], rel=1e-6)
    assert to_inputs(pixels, 3, None).flatten().tolist() == pytest.approx([0.0, 0.2, 1.0], rel=1e-6)


def test_a_grey_channel_is_repeated_before_it_is_normalised():
    pixels = noise(2, 1, 4, 5)
    before = pixels.copy()
    mean, deviation = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    found = to_inputs(pixels, 3, (mean, deviation))
    grey = pixels[:, 0] / np.float32(255)
    for channel in range(3):
        expected = (grey - np.float32(mean[channel])) / np.float32(deviation[channel])
        assert np.array_equal(found[:, channel].numpy(), expected)
    assert np.array_equal(pixels, before)
    found += 1
    assert not np.shares_memory(found.numpy(), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_files_of_every_colour_mode_become_rgb(tmp_path, mode):
    grey = Image.fromarray(noise(6, 8) & 0xF0)
    kind = "jpg" if mode == "CMYK" else "png"
    path = tmp_path / f"image.{kind}"
    image = grey.convert(mode)
    image.save(path, **({"transparency": bytes(range(16))} if mode == "P" else {}))
    found = open_photo(path, Geometry())
    assert found.shape == (3, 6, 8)
    if mode in ("L", "P", "RGBA", "LA"):
        assert np.array_equal(found, np.repeat(np.asarray(grey)[None], 3, 0))
    else:
        assert np.array_equal(found, np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1))


def test_deep_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="expected 8 bits per channel"):
        open_photo(tmp_path / "deep.png", Geometry())


def test_an_image_that_resizing_would_make_empty_is_refused():
    with pytest.raises(ValueError, match="resizing 400x1 to 4x0|leaves nothing"):
        arrange_pixels(noise(1, 1, 400), Geometry((0, 4)))
