"""Image files are read as a viewer shows them, wherever they are read; the others are named."""

import io
import os
import struct
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from distill.data import from_recipe
from distill.data.images import list_images
from distill.data.listing import Item
from distill.data.pictures import picture
from distill.data.prompts import list_prompts
from distill.planning import doctor
from eval import images
from eval.errors import MetricError
from eval.protocols import reference
from tests.helpers.datasets import folder_of, pixels, png, recipe, tar_of
from tests.helpers.datasets import picture as photo
from tests.helpers.refusals import refused


def saved(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def read(content, channels=3, side=8):
    """(C, H, W) as it would be learnt from; what is bad is given back as it is."""
    found = picture(Item("x", None, lambda: content), channels, side, side)
    return getattr(found, "pixels", found)


def values(content):
    return np.asarray(images.to_srgb(images.open_image(io.BytesIO(content)))).astype(int)


def flat(mode, value, side=8):
    return Image.new(mode, (side, side), value)


# ---- opacity


CLEAR = {  # half-opaque or clear pixels, and what shows over white
    "RGBA": (flat("RGBA", (200, 0, 100, 51)), (244, 204, 224)),
    "clear RGBA": (flat("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
    "LA": (flat("LA", (50, 51)), (214, 214, 214)),
    "RGB with a key": (flat("RGB", (1, 2, 3)), (255, 255, 255), {"transparency": (1, 2, 3)}),
    "L with a key": (flat("L", 7), (255, 255, 255), {"transparency": 7}),
    "L with another key": (flat("L", 7), (7, 7, 7), {"transparency": 8}),
    "1 with a key": (flat("1", 0), (255, 255, 255), {"transparency": 0}),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_shows_white(name):
    image, want, *how = CLEAR[name]
    found = values(saved(image, **(how[0] if how else {})))
    assert np.abs(found - want).max() <= 1


def test_a_palette_with_clear_entries_shows_white_there():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert values(saved(image, kind)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
        found = values(saved(image, kind, transparency=0))
        assert found.tolist() == [[[255, 255, 255], [0, 0, 255]]]
    half = values(saved(image, transparency=bytes([255, 51]))).tolist()
    assert half == [[[255, 0, 0], [204, 204, 255]]]


def test_opaque_pixels_beside_an_alpha_channel_are_what_they_were():
    rgb = photo(1)
    whole = rgb.copy()
    whole.putalpha(255)
    assert np.array_equal(values(saved(whole)), np.asarray(rgb))


# ---- colours


COLUMNS = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708),
           "b": (0.14307, 0.06061, 0.71410)}  # fmt: skip  # sRGB's primaries, adapted to D50


def profile(order="rgb", space=b"RGB ", gamma=1.0):
    """An ICC profile of sRGB's primaries, taken in this order, with a pure power for its curve."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"cprt": text}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, column in zip(b"rgb", order):
            tags[bytes([name]) + b"XYZ"] = xyz(COLUMNS[column])
            tags[bytes([name]) + b"TRC"] = curve
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    white = b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    head = struct.pack(">I4xI4s4s4s12x4s", place + len(body), 0x02400000, b"mntr", space, b"XYZ ",
                       b"acsp") + bytes(28) + white  # fmt: skip
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def encoded(value):
    """A linear level of 255 in sRGB's own curve."""
    v = value / 255
    return 255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_profile_of_other_colours_is_converted_to_srgb(kind):
    color = (200, 20, 80)
    how = {"icc_profile": profile("grb")} | ({"lossless": True} if kind == "WEBP" else {})
    found = values(saved(flat("RGB", color), kind, **how))
    want = [encoded(color[i]) for i in (1, 0, 2)]  # red is called green, and linear
    assert np.abs(found - want).max() <= (1 if kind != "JPEG" else 3)


def test_a_profile_counts_beside_an_alpha_channel_and_on_grey_and_palette_pixels():
    grey = {"icc_profile": profile(space=b"GRAY")}
    assert np.abs(values(saved(flat("L", 60), **grey)) - encoded(60)).max() <= 1
    over = np.abs(values(saved(flat("LA", (60, 51)), **grey)) - (encoded(60) / 5 + 204)).max()
    assert over <= 1
    color = {"icc_profile": profile("grb")}
    want = [encoded(v) for v in (20, 200, 80)]
    clear = values(saved(flat("RGBA", (200, 20, 80, 51)), **color))
    assert np.abs(clear - [v / 5 + 204 for v in want]).max() <= 1
    image = Image.new("P", (4, 4))
    image.putpalette([200, 20, 80])
    assert np.abs(values(saved(image, **color)) - want).max() <= 1


@pytest.mark.parametrize(
    "icc", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile",
            profile(space=b"GRAY")],
    ids=["sRGB", "damaged", "of grey, on colours"],
)  # fmt: skip
def test_a_profile_that_says_nothing_new_changes_no_bit(icc):
    assert np.array_equal(values(saved(photo(3), icc_profile=icc)), np.asarray(photo(3)))


def test_lab_and_cmyk_pixels_are_shown_in_srgb():
    lab = ImageCms.profileToProfile(
        flat("RGB", (200, 60, 90)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert np.abs(values(saved(lab, "TIFF")) - (200, 60, 90)).max() <= 2
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(values(saved(cmyk, kind)) - (255, 0, 0)).max() <= 2


# ---- depth


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_sixteen_bits_keeps_its_scale(kind):
    deep = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    found = values(saved(Image.fromarray(deep), kind))
    assert np.abs(found - np.round(deep / 257)[..., None]).max() <= 0
    one = read(saved(Image.fromarray(deep), kind), channels=1)
    assert np.array_equal(one[0].numpy(), np.round(deep / 257))


def test_grey_of_sixteen_bits_may_have_a_clear_level_or_white_for_zero():
    deep = Image.fromarray(np.array([[1000, 65535]], np.uint16))
    assert values(saved(deep, transparency=1000))[0, :, 0].tolist() == [255, 255]
    low = Image.fromarray(np.array([[1000, 40000]], np.uint16))
    assert values(saved(low, transparency=1001))[0, :, 0].tolist() == [4, 156]
    negative = values(saved(low, "TIFF", tiffinfo={262: 0}))
    assert negative[0, :, 0].tolist() == [251, 99]


def test_pixels_without_a_known_white_are_bad_by_name():
    for mode in ("F", "I"):
        found = read(saved(flat(mode, 3), "TIFF"))
        assert found.kind == "corrupt image" and f"mode {mode}" in found.reason


# ---- orientation


TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip  # that undo themselves


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_is_upright_and_so_is_its_size(kind):
    corners = np.zeros((32, 64, 3), np.uint8)
    corners[:16, :32], corners[:16, 32:], corners[16:, :32] = (250, 5, 5), (5, 250, 5), (5, 5, 250)
    upright = Image.fromarray(corners)
    for number, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = number
        content = saved(upright.transpose(Image.Transpose[turn]), kind, exif=exif)
        assert images.size_of(images.open_image(io.BytesIO(content))) == (64, 32), number
        assert np.abs(values(content) - corners).mean() < 4, number


# ---- formats and frames


EVERY = {"PNG": ".png", "JPEG": ".JPG", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif",
         "TIFF": ".tif", "AVIF": ".avif", "JPEG2000": ".jp2", "PPM": ".ppm"}  # fmt: skip


def test_every_suffix_that_pillow_knows_is_read_or_counted():
    Image.init()
    known = {k for k, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert known <= images.suffixes() | images.unread_suffixes()
    assert not images.suffixes() & images.unread_suffixes()
    assert {".heic", ".svg", ".jxl", ".psd", ".tga"} <= images.unread_suffixes()


def test_common_formats_are_read_from_folders_and_shards(tmp_path):
    (tmp_path / "a").mkdir()
    kinds = {k: v for k, v in EVERY.items() if v.lower() in images.suffixes()}
    assert len(kinds) >= 8
    for kind, suffix in kinds.items():
        (tmp_path / f"a/{kind}{suffix}").write_bytes(saved(flat("RGB", (90, 90, 90), 16), kind))
    tar_of(
        tmp_path / "a.tar", [(p.name, p.read_bytes()) for p in sorted((tmp_path / "a").iterdir())]
    )
    for place in ("a", "a.tar"):
        source = from_recipe.source_of(recipe(source=str(tmp_path / place)), pixels())
        assert source.size == len(kinds)
        assert ((source.x + 1) * 127.5 - 90).abs().max() < 4


def test_formats_that_are_not_read_are_named_and_run_no_program(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(png(1))
    (tmp_path / "y.heic").write_bytes(b"...")
    (tmp_path / "z.PSD").write_bytes(b"...")
    listing = list_images(str(tmp_path), None, 0, False)
    assert [i.name for i in listing.items] == [str(tmp_path / "x.png")]
    assert [(os.path.basename(b.name), b.kind) for b in listing.left_out] == [
        ("y.heic", "format not read"),
        ("z.PSD", "format not read"),
    ]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "2 files are left out (format not read)" in err
    assert f"{tmp_path / 'y.heic'}: its format is not read; save it as PNG or JPEG" in err
    assert read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n").kind == "corrupt image"


def test_system_files_are_no_images(tmp_path):
    good = tmp_path / ".hidden/photos"
    good.mkdir(parents=True)
    (good / "x.png").write_bytes(png(1))
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/x.png", "@eaDir/x.png", "._x.png", ".y.png"):
        (good / name).parent.mkdir(exist_ok=True)
        (good / name).write_bytes(b"no image")
    listing = list_images(str(good), None, 0, False)
    assert [i.name for i in listing.items] == [str(good / "x.png")]
    assert not listing.bad and not listing.left_out
    assert reference.image_paths("x", good) == [good / "x.png"]
    names = ["__MACOSX/._x.png", "._x.png", ".DS_Store", "./x.png"]
    tar_of(tmp_path / "s.tar", [(n, png(1)) for n in names])
    shard = list_images(str(tmp_path / "s.tar"), None, 0, False)
    assert [i.name for i in shard.items] == [f"{tmp_path}/s.tar/./x"] and not shard.bad


def test_links_are_followed_and_those_to_nothing_are_bad(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x.png").write_bytes(png(1))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/again").symlink_to(tmp_path / "real")
    (tmp_path / "a/gone.png").symlink_to(tmp_path / "nothing.png")
    listing = list_images(str(tmp_path / "a"), None, 0, False)
    assert [i.name for i in listing.items] == [str(tmp_path / "a/linked/x.png")]
    assert [(b.name, b.kind) for b in listing.bad] == [
        (str(tmp_path / "a/gone.png"), "missing file")
    ]


def test_images_and_archives_beside_what_is_read_are_named(tmp_path, capsys):
    tar_of(tmp_path / "s.tar", [("0.png", png(0)), ("0.JPG", png(2)), ("0.seg.png", png(3))])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x.png").write_bytes(png(1))
    tar_of(tmp_path / "sub/t.tar", [("0.png", png(0))])
    listing = list_images(str(tmp_path), None, 0, False)
    assert len(listing.items) == 1 and listing.items[0].image() == png(0)
    assert {(os.path.relpath(b.name, tmp_path), b.kind) for b in listing.left_out} == {
        ("s.tar/0.jpg", "second image"),
        ("sub/t.tar", "archive"),
        ("sub/x.png", "beside shards"),
    }
    assert capsys.readouterr().err.count("\n") == 3


def test_a_link_among_the_images_of_a_shard_is_bad_by_name(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(png(0))
        tar.addfile(info, io.BytesIO(png(0)))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    listing = list_images(str(tmp_path / "s.tar"), None, 0, False)
    assert len(listing.items) == 1
    assert [(b.name, b.kind) for b in listing.bad] == [
        (f"{tmp_path}/s.tar/1.png", "link in a shard")
    ]


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_of_an_animation_the_first_frame_is_read_and_said_to_be(tmp_path, capsys, memory):
    (tmp_path / "a").mkdir()
    frames = [flat("RGB", (v, v, v)) for v in (10, 200, 90)]
    kinds = {"PNG": {}, "GIF": {}, "WEBP": {"lossless": True}, "TIFF": {}}
    for kind, how in kinds.items():
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **how)
        (tmp_path / f"a/x{EVERY[kind]}").write_bytes(content)
    (tmp_path / "a/still.gif").write_bytes(saved(frames[0], "GIF"))
    data = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c"), "in_memory_gb": memory}
    source = from_recipe.source_of(recipe(**data), pixels())
    names = [str(tmp_path / f"a/x{s}") for s in (".gif", ".png", ".tif", ".webp")]
    assert source.report["first_frames"] == names
    err = capsys.readouterr().err
    assert f"4 images have several frames or pages, such as {names[0]}; the first" in err
    x = torch.cat([source.batch(d, 0, 1, 1).data for d in range(5)])
    assert ((x + 1) * 127.5 - 10).abs().max() < 1
    if not memory:  # and a cache that is there says so again
        assert from_recipe.source_of(recipe(**data), pixels()).report["first_frames"] == names


# ---- every place reads so


def test_references_and_the_doctor_read_as_the_data_do(tmp_path):
    content = saved(flat("RGBA", (200, 20, 80, 51)), icc_profile=profile("grb"))
    (tmp_path / "x.png").write_bytes(content)
    (tmp_path / "deep.png").write_bytes(saved(Image.fromarray(np.full((8, 8), 51400, np.uint16))))
    paths = reference.image_paths("x", tmp_path)
    found = torch.cat(list(reference.chunks("x", paths)))
    assert torch.equal(found, torch.stack([read(p.read_bytes()) for p in paths]))
    assert found[0, 0, 0, 0] == 200
    seen = doctor.picture(tmp_path / "x.png", 3, (8, 8))
    assert torch.equal(((seen + 1) * 127.5).round().byte(), found[1])


def test_statistics_of_stored_pixels_are_not_taken_for_those_of_shown_ones(tmp_path):
    for name, image in (("plain", photo(1)), ("clear", photo(1).convert("RGBA"))):
        (tmp_path / f"{name}.png").write_bytes(saved(image))
    files = [tmp_path / "plain.png", tmp_path / "clear.png"]
    plain, clear = reference.hashes("x", files)
    assert len(plain) == 64 and clear.endswith(" shown")


def test_an_animation_is_no_picture_of_a_reference(tmp_path):
    frames = [flat("RGB", (v, v, v)) for v in (10, 200)]
    path = tmp_path / "x.gif"
    path.write_bytes(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    with pytest.raises(MetricError, match=r"x\.gif holds several frames; save one"):
        list(reference.hashes("x", [path]))


def test_reading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        values(saved(image, transparency=bytes([255, 51])))


def test_a_pipe_is_no_image_and_no_file_of_prompts(tmp_path):
    folder = folder_of(tmp_path / "a", 1)
    os.mkfifo(folder / "001.png")
    (folder / "002.png").symlink_to(folder / "none.png")
    pipe, link = list_images(str(folder), None, 0, True).bad
    assert "pipe" in pipe.reason and pipe.name == str(folder / "001.png")
    assert "link" in link.reason and link.name == str(folder / "002.png")
    with refused("data.prompts", "device"):
        list_prompts(str(folder / "001.png"))
