"""From image bytes to the square that the VAE sees, whatever kind of picture it is."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from conftest import image_bytes, smooth_image
from PIL import Image, ImageOps, PngImagePlugin, features

import precompute.pixels
from precompute.pixels import Picture, UnusableImageError

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"]
FORMATS += ["AVIF"] if features.check("avif") else []  # a matter of Pillow's build


def decoded(data: bytes) -> np.ndarray:
    """[H, W, 3] as integers that can be subtracted."""
    return decode(data).astype(int)


def decode(data: bytes) -> np.ndarray:
    """Upright pixels, uint8 [H, W, 3]."""
    picture = Picture(data)
    picture.expect_usable()
    pixels = picture.decode().upright()
    assert pixels.shape == (picture.height, picture.width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return smooth_image(np.random.default_rng(0), width, height)


def with_transparent_colour(image: Image.Image, colour: Any) -> bytes:
    return image_bytes(image, "PNG", transparency=colour)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.transpose(1, 0, 2)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda stored: np.rot90(stored, 1)),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_pictures_are_turned_upright_as_exif_says(orientation, turn, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.asarray(picture()).astype(int)
    found = decoded(image_bytes(picture(), file_format, exif=exif))
    assert np.abs(found - turn(stored)).mean() <= (0 if file_format == "PNG" else 6)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x" * 50])
def test_broken_exif_costs_no_picture(exif):
    found = decoded(image_bytes(picture(), "JPEG", exif=exif, quality=95))
    assert found.shape == (30, 40, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(mode):
    colour = picture().convert(mode[:-1])
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1)))
    image = colour.convert(mode)
    image.putalpha(alpha)
    share = np.asarray(alpha)[..., None] / 255
    expected = share * np.asarray(colour.convert("RGB")) + (1 - share) * 255
    assert np.abs(decoded(image_bytes(image)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGB", (9, 8), (10, 20, 30)), (10, 20, 30)),
        (Image.new("L", (9, 8), 77), 77),
        (Image.new("1", (9, 8), 0), 0),
        (Image.new("I;16", (9, 8), 1234), 1234),
        (picture().quantize(4).point(lambda _: 3), 3),
    ],
    ids=["RGB", "L", "1", "I;16", "P"],
)
def test_a_colour_that_is_declared_transparent_becomes_white(image, colour):
    data = with_transparent_colour(image, colour)
    assert "transparency" in Image.open(io.BytesIO(data)).info
    assert (decoded(data) == 255).all()


def test_the_other_colours_stay_as_they_are_beside_a_transparent_one():
    image = Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
    assert decoded(with_transparent_colour(image, 100))[..., 0].tolist() == [[0, 255], [200, 255]]
    deep = Image.fromarray(np.array([[0, 257 * 9], [257 * 90, 65535]], np.uint16))
    assert decoded(with_transparent_colour(deep, 0))[..., 0].tolist() == [[255, 9], [90, 255]]


def test_greyscale_becomes_three_equal_channels():
    grey = picture().convert("L")
    found = decoded(image_bytes(grey))
    assert (found == np.asarray(grey)[..., None]).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(file_format):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    found = decoded(image_bytes(Image.fromarray(values), file_format))
    assert (found == np.arange(256).reshape(16, 16, 1)).all()


def test_one_bit_becomes_black_and_white():
    values = np.random.default_rng(0).random((8, 8)) > 0.5
    assert (decoded(image_bytes(Image.fromarray(values))) == 255 * values[..., None]).all()


def test_a_palette_is_looked_up():
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    assert (decoded(image_bytes(image)) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
)
@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_comes_out_in_its_colours(ink, colour, file_format):
    found = decoded(image_bytes(Image.new("CMYK", (16, 16), ink), file_format))
    assert np.abs(found - np.array(colour)).max() <= 6


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = image_bytes(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert (decoded(data) == (255, 0, 0)).all()


def test_a_lossless_picture_is_decoded_to_the_bit():
    assert (decoded(image_bytes(picture())) == np.asarray(picture())).all()


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"not a picture", b"<svg/>", b"<html>404</html>", b"%PDF-1.4", b"GIF89a", b"BM"],
)
def test_what_is_no_picture_has_a_reason(data):
    with pytest.raises(UnusableImageError) as error:
        decode(data)
    assert error.value.reason in ("not_an_image", "broken_image")


def test_no_program_is_run_on_a_strangers_bytes():
    with pytest.raises(UnusableImageError, match="not_an_image"):
        decode(image_bytes(picture(), "EPS"))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_cut_short_has_a_reason(file_format):
    data = image_bytes(picture(200, 150), file_format)
    with pytest.raises(UnusableImageError) as error:
        decode(data[: len(data) // 2])
    assert error.value.reason in ("not_an_image", "broken_image")


@pytest.mark.parametrize("file_format", FORMATS)
def test_damage_anywhere_is_a_reason_or_a_picture_and_never_another_error(file_format):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "lying"
    options = {"exif": exif} if file_format in ("JPEG", "WEBP", "PNG", "TIFF", "AVIF") else {}
    whole = image_bytes(picture(), file_format, **options)
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else 200, rng.integers(1, 9)):
            data[place % len(data)] = rng.choice([0, 255, rng.integers(0, 256)])
        try:
            assert decode(bytes(data[: rng.integers(1, 2 * len(data))])).ndim == 3
        except UnusableImageError as error:
            assert error.reason  # noqa: PT017 - any other error fails the test


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that would unpack to width times height pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("size", [(14_000, 14_000), (20_001, 10_000), (100_000, 100_000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_takes_memory(size):
    with pytest.raises(UnusableImageError, match="too_many_pixels"):
        decode(png_that_claims(*size))


def test_a_large_picture_within_the_limit_is_not_refused_for_its_size(monkeypatch):
    assert precompute.pixels.MAX_PIXELS >= 100_000_000
    with pytest.raises(UnusableImageError, match="broken_image"):  # it has no pixels, but may
        decode(png_that_claims(10_000, 10_000))


# By libjpeg-turbo, held to PIL's own decoder.


def by_pil(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def with_orientation(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "optimized": {"optimize": True, "quality": 30},
    "best": {"quality": 100, "subsampling": 0},
    "restarts by blocks": {"restart_marker_blocks": 3},
    "restarts by rows": {"restart_marker_rows": 1, "progressive": True},
    "RGB": {"keep_rgb": True},
    "streamtype": {"streamtype": 0},
}
JPEGS |= {f"orientation {n}": with_orientation(n) for n in range(10)}
JPEGS |= {f"orientation {n}, 4:2:0": with_orientation(n) | {"subsampling": 2} for n in (3, 6, 8)}


@pytest.mark.parametrize("options", JPEGS.values(), ids=list(JPEGS))
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 1), (15, 16), (17, 33), (64, 48), (201, 135)], ids=str
)
def test_a_jpeg_is_decoded_as_pil_decodes_it(options, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for image in (picture(*size), Image.fromarray(noise)):
        data = image_bytes(image, "JPEG", **options)
        assert np.array_equal(decode(data), by_pil(data))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_of_other_colours_are_decoded_as_pil_decodes_them(mode, orientation):
    data = image_bytes(picture().convert(mode), "JPEG", **with_orientation(orientation))
    assert np.array_equal(decode(data), by_pil(data))


@pytest.mark.parametrize(("components", "transform"), [(3, 0), (3, 1), (4, 0), (4, 2)])
def test_adobes_marker_says_what_the_components_are(components, transform):
    """RGB, YCbCr, CMYK and YCCK; PIL writes only some of them, so the marker is put in."""
    mode = "RGB" if components == 3 else "CMYK"
    data = image_bytes(picture().convert(mode), "JPEG", subsampling=0)
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    start = data.find(b"\xff\xee")  # PIL's own, of CMYK
    if start >= 0:
        data = data[:start] + data[start + 16 :]
    jfif = data[:2] + marker + (data[20:] if data[6:10] == b"JFIF" else data[2:])
    assert Image.open(io.BytesIO(jfif)).info["adobe_transform"] == transform
    assert np.array_equal(decode(jfif), by_pil(jfif))


@pytest.mark.parametrize("garbage", [b"\0", b"\xff\xd8\xff", b"<html>" * 999, b"\xff\xd9" * 3])
def test_garbage_behind_a_jpeg_costs_nothing(garbage):
    data = image_bytes(picture(), "JPEG")
    assert np.array_equal(decode(data + garbage), by_pil(data))


def test_of_an_mpo_the_first_picture_counts():
    second = Image.new("RGB", (40, 30), "blue")
    data = image_bytes(picture(), "MPO", save_all=True, append_images=[second])
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.n_frames) == ("MPO", 2)  # type: ignore[attr-defined]
    assert np.array_equal(decode(data), by_pil(data))
    assert np.abs(decoded(data) - np.asarray(picture())).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_turned_once(orientation, compression):
    stored = image_bytes(picture(), "TIFF", compression=compression, tiffinfo={0x0112: orientation})
    png = image_bytes(picture(), "PNG", **with_orientation(orientation))
    assert np.array_equal(decode(stored), decode(png))


def test_the_end_of_a_jpeg_may_be_missing_if_no_pixel_is():
    data = image_bytes(picture(), "JPEG")
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(decode(data[:-2] + b"\xff\xd9"), by_pil(data))
    with pytest.raises(UnusableImageError, match="broken_image"):
        decode(data[: -len(data) // 3])


@pytest.mark.parametrize("divisor", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7])
def test_a_reduced_decode_says_how_much_of_it_is_the_picture(divisor, orientation):
    for width, height in [(160, 96), (161, 97), (167, 103), (1, 9), (8, 8)]:
        data = image_bytes(picture(width, height), "JPEG", **with_orientation(orientation))
        pixels = Picture(data).decode(divisor)
        assert pixels.stored.shape == (-(-height // divisor), -(-width // divisor), 3)
        assert (pixels.height, pixels.width) == (height / divisor, width / divisor)
        sides = pixels.upright().shape[:2]
        assert sides == pixels.stored.shape[:2][:: -1 if pixels.is_sideways else 1]


@pytest.mark.parametrize("file_format", [name for name in FORMATS if name != "JPEG"])
def test_only_jpegs_are_reduced(file_format):
    data = image_bytes(picture(160, 96), file_format)
    pixels = Picture(data).decode(8)
    assert pixels.divisor == 1
    assert np.array_equal(pixels.upright(), decode(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_damage_in_a_jpeg_gives_a_reason_or_pixels_of_the_stated_size_at_any_scale(options):
    rng = np.random.default_rng(0)
    whole = image_bytes(picture(161, 97), "JPEG", **with_orientation(6), **options)
    outcomes = set()
    for number in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if number % 2 else 700, rng.integers(1, 6)):
            data[place % len(data)] = rng.choice([0, 255, rng.integers(0, 256)])
        for divisor in (1, 8):
            try:
                found = Picture(bytes(data))
                pixels = found.decode(divisor)
            except UnusableImageError as error:
                outcomes.add(error.reason)
                continue
            outcomes.add("ok")
            assert pixels.divisor in (1, divisor)
            stored = (-(-side // pixels.divisor) for side in (found.height, found.width))
            assert pixels.upright().shape == (*stored, 3)
    assert {"ok", "broken_image"} <= outcomes


def test_a_png_of_too_many_pixels_is_refused_before_its_exif_is_looked_for(monkeypatch):
    """Its EXIF may be behind its pixels: PIL unpacks all of them to find it."""
    monkeypatch.setattr(precompute.pixels, "MAX_PIXELS", 1000)
    data = image_bytes(picture(40, 30), "PNG", **with_orientation(6))
    with monkeypatch.context() as patch:
        patch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("was unpacked"))
        with pytest.raises(UnusableImageError, match="too_many_pixels"):
            Picture(data)


@pytest.mark.parametrize(("size", "usable"), [((20, 1), True), ((21, 1), False), ((2, 41), False)])
def test_banners_and_rulers_are_refused(size, usable):
    found = Picture(image_bytes(Image.new("RGB", size)))
    if usable:
        found.expect_usable()
    else:
        with pytest.raises(UnusableImageError, match="absurd_aspect_ratio"):
            found.expect_usable()
