"""Pictures -> patches, and boxes between the pixels of a file and those that the model sees."""

import io
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

import common
from support import report

SIZES = [(640, 480), (1296, 968), (112, 112), (84, 140), (333, 97), (61, 517), (28, 28)]  # width, height


@pytest.fixture
def processor():
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)


def seen(processor, picture, size):
    """The picture as the model sees it: resized to `size`, normalised, (3, height, width)."""
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float64) / 255
    return ((pixels - processor.image_mean) / processor.image_std).transpose(2, 0, 1)


def naive_patches(frames):
    """Patches of 14 x 14 of pairs of frames: (patches, 3 * 2 * 14 * 14). The four patches of a square that will be one
    token follow each other; the squares run along rows."""
    _, height, width = frames[0].shape
    out = []
    for pair in range(0, len(frames), 2):
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for down in (0, 14):
                    for right in (0, 14):
                        place = slice(top + down, top + down + 14), slice(left + right, left + right + 14)
                        patch = [frames[pair + half][channel][place] for channel in range(3) for half in (0, 1)]
                        out.append(np.concatenate([part.ravel() for part in patch]))
    return np.array(out)


# ------------------------------------------------------------------------------------------------
# Patches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(112, 84), (200, 130)])
def test_video_patches_equal_the_naive_ones(processor, photo, count, size):
    """Every frame is another picture, so that a frame in a wrong half or pair shows."""
    pictures = [photo(*size, seed=n) for n in range(count)]
    pixels, grids = common.picture_patches(processor, pictures, video=True)
    frames = [seen(processor, picture, common.resized_size(processor, *size)) for picture in pictures]
    if count % 2:
        frames.append(frames[-1])
    _, height, width = frames[0].shape
    assert grids.tolist() == [[len(frames) // 2, height // 14, width // 14]]
    assert pixels.shape == (len(frames) // 2 * (height // 14) * (width // 14), 3 * 2 * 14 * 14)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), naive_patches(frames), atol=1e-5)


def test_an_odd_video_repeats_its_last_frame_and_keeps_its_list(processor, photo):
    pictures = [photo(112, 84, seed=n) for n in range(3)]
    odd, _ = common.picture_patches(processor, pictures, video=True)
    even, _ = common.picture_patches(processor, pictures + pictures[-1:], video=True)
    assert torch.equal(odd, even)
    assert len(pictures) == 3


def test_image_patches_equal_the_processor_and_the_naive_ones(processor, photo):
    """Several pictures of unlike sizes, one after the other; both halves of a temporal patch hold the still picture."""
    pictures = [photo(*size, seed=n) for n, size in enumerate([(112, 84), (200, 130), (60, 120)])]
    pixels, grids = common.picture_patches(processor, pictures)
    start = 0
    for picture, grid in zip(pictures, grids):
        own = processor(images=[picture], return_tensors="pt")
        assert grid.tolist() == own["image_grid_thw"][0].tolist()
        part = pixels[start : start + int(grid.prod())]
        assert torch.equal(part, own["pixel_values"])
        frame = seen(processor, picture, common.resized_size(processor, *picture.size))
        np.testing.assert_allclose(part.numpy(), naive_patches([frame, frame]), atol=1e-5)
        start += len(part)
    assert start == len(pixels)


def test_picture_text_has_one_pad_for_each_square_of_four_patches():
    grids = torch.tensor([[1, 4, 6], [1, 2, 2]])
    wanted = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
    assert common.picture_text(grids, 2, video=False) == wanted
    wanted = "<|vision_start|>" + "<|video_pad|>" * 18 + "<|vision_end|>"
    assert common.picture_text(torch.tensor([[3, 4, 6]]), 2, video=True) == wanted


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
@pytest.mark.parametrize("family", common.FAMILIES)
def test_tokens_positions_and_pixels_equal_the_full_processor(tiny_models, photo, tmp_path, family, video):
    """The family's own processor needs torchvision, which this repository does without."""
    pytest.importorskip("torchvision")
    import transformers

    backbone, timed = common.load_backbone(tiny_models(family), "fp32"), family == "qwen3_vl"
    side = backbone.processor.patch_size * 2
    count = (5 if timed else 6) if video else 3
    pictures = [photo(4 * side, 3 * side, seed=n) for n in range(count)]  # need no resizing, so pixels are exact
    paths = [str(tmp_path / f"{20 * n}.png") for n in range(len(pictures))]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    (prefix,) = common.encode_scenes(backbone, [common.Scene(tuple(paths), "video" if video else "multi_view", [])])
    pixels, grids = common.picture_patches(backbone.processor, pictures, video)
    whole = getattr(transformers, {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family] + "Processor")
    frames = transformers.Qwen3VLVideoProcessor if timed else transformers.Qwen2VLVideoProcessor
    normal = {"image_mean": backbone.processor.image_mean, "image_std": backbone.processor.image_std}
    full = whole(backbone.processor, backbone.tokenizer, frames(do_resize=False, do_sample_frames=False, **normal))
    pad = "<|video_pad|>" if video else "<|image_pad|>"
    words = f"<|im_start|>system\n{common.SYSTEM}<|im_end|>\n<|im_start|>user\n"
    words += pad if video and timed else f"<|vision_start|>{pad}<|vision_end|>" * (1 if video else 3)
    if video:  # Qwen2.5-VL: pictures without times, two frames a second, so one pair a second; Qwen3-VL: ScanNet's frames
        times = {"fps": 30.0, "frames_indices": [0, 20, 40, 60, 80]} if timed else {"fps": 2.0, "frames_indices": [*range(6)]}
        metadata = [times | {"total_num_frames": times["frames_indices"][-1] + 1}]
        out = full(text=[words], videos=[pictures], video_metadata=metadata, return_tensors="pt")
    else:
        out = full(text=[words], images=pictures, return_tensors="pt")
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    assert prefix.ids.tolist() == out["input_ids"][0].tolist()
    assert grids.tolist() == out[names[1]].tolist()
    torch.testing.assert_close(pixels, out[names[0]], atol=1e-5, rtol=0)
    extra = {name: out[name] for name in (names[1], "second_per_grid_ts") if name in out}
    positions, _ = backbone.model.model.get_rope_index(out["input_ids"], out["mm_token_type_ids"], **extra)
    # Behind a video with times as positions transformers goes on from another number than Qwen: see mrope_positions.
    same = len(prefix.ids) - (video and family == "qwen2_5_vl")
    assert prefix.positions[:, :same].tolist() == positions[:, 0, :same].tolist()


def video_scene(folder, names):
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)
    return common.Scene(tuple(str(folder / name) for name in names), "video", [])


def test_times_of_numbered_frames(tmp_path):
    """The mean time of the two frames of a pair; an odd number of frames repeats the last one. By hand, 30 frames a second."""
    scene = video_scene(tmp_path, ["0.jpg", "45.jpg", "90.jpg", "scene0011_00-150.jpg", "frame_000300.jpg"])
    assert common.pair_times(scene.images, None, 30.0) == [0.75, 4.0, 10.0]
    assert common.pair_times(scene.images, None, 15.0) == [1.5, 8.0, 20.0]
    grids = torch.tensor([[3, 4, 2]])
    span = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    wanted = f"<0.8 seconds>{span}<4.0 seconds>{span}<10.0 seconds>{span}"
    assert common.picture_text(grids, 2, True, common.pair_times(scene.images, None, 30.0)) == wanted


@pytest.mark.parametrize("names", [["a.jpg", "b.jpg"], ["20.jpg", "0.jpg"], ["a.jpg", "20.jpg"]], ids=str)
def test_frames_without_rising_numbers_have_no_times(tmp_path, names):
    with pytest.raises(SystemExit, match=f"{names[0]} and the other frames of its video have no rising numbers"):
        common.pair_times(video_scene(tmp_path, names).images, None, 30.0)


def test_times_of_an_mp4_are_its_own(tmp_path, tiny_models):
    """10 frames a second; five of 21 frames are 0, 5, 10, 15 and 20."""
    pytest.importorskip("decord")
    write_mp4(tmp_path / "a.mp4", [Image.new("RGB", (64, 64), (10 * n, 10 * n, 10 * n)) for n in range(21)])
    backbone = common.load_backbone(tiny_models("qwen3_vl"), "fp32")
    backbone.frames, backbone.fps = 5, 1000.0
    scene = common.Scene((str(tmp_path / "a.mp4"),), "video", [])
    assert common.scene_patches(backbone, scene)[2] == [0.25, 1.25, 2.0]
    (prefix,) = common.encode_scenes(backbone, [scene])
    text = backbone.tokenizer.decode(prefix.ids)
    assert [part.partition(" seconds>")[0] for part in text.split("<") if " seconds>" in part] == ["0.2", "1.2", "2.0"]


# ------------------------------------------------------------------------------------------------
# Sizes and boxes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width,height", SIZES)
@pytest.mark.parametrize("limits", [(56 * 56, 112 * 112), (16 * 28 * 28, 128 * 28 * 28), (56 * 56, 12845056)])
def test_resized_size_is_the_size_of_the_processors_grid(photo, width, height, limits):
    processor = Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1])
    size = common.resized_size(processor, width, height)
    _, rows, columns = processor(images=[photo(width, height)], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert size == (14 * columns, 14 * rows)
    assert size[0] % 28 == size[1] % 28 == 0
    assert size[0] * size[1] <= limits[1]


def test_limits_given_at_loading_decide_the_size(tiny_model):
    """The limits belong to a run: they replace those of the model's folder, one by one."""
    for limits, limit in (({}, 112), ({"max_picture_tokens": 64}, 224)):
        backbone = common.load_backbone(tiny_model, "fp32", **limits)
        assert common.resized_size(backbone.processor, 1000, 1000) == (limit, limit)
        _, rows, _ = backbone.processor(images=[Image.new("RGB", (1000, 1000))])["image_grid_thw"][0]
        assert 14 * rows == limit


@pytest.mark.parametrize("width,height", SIZES)
def test_boxes_go_to_the_resized_picture_and_back_within_one_pixel(width, height):
    """At pixel limits that keep pictures about as large as they are."""
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056)
    source, rng = (width, height), np.random.default_rng(0)
    target = common.resized_size(processor, *source)
    for _ in range(200):
        x, y = np.sort(rng.integers(0, width + 1, 2)), np.sort(rng.integers(0, height + 1, 2))
        box = [int(value) for value in (x[0], y[0], x[1], y[1])]
        there = common.scale_box(box, source, target)
        assert all(isinstance(value, int) for value in there)
        assert np.abs(np.subtract(common.scale_box(there, target, source), box)).max() <= 1
        exact = [value * to / of for value, of, to in zip(box, source * 2, target * 2)]
        assert np.abs(np.subtract(there, exact)).max() <= 0.5


@pytest.mark.parametrize("width,height", [(640, 480), (1296, 968)])
def test_boxes_of_a_small_picture_go_to_the_large_one_and_back_unchanged(processor, width, height):
    source, rng = (width, height), np.random.default_rng(0)
    target = common.resized_size(processor, *source)
    assert target == (112, 84)
    for _ in range(200):
        corners = rng.integers(0, 57, 2).tolist() + rng.integers(57, 85, 2).tolist()
        back = common.scale_box(common.scale_box(corners, target, source), source, target)
        assert back == corners


def test_boxes_are_clipped_to_the_picture():
    assert common.scale_box([-5, -0.2, 641, 500], (640, 480), (1280, 960)) == [0, 0, 1280, 960]
    assert common.scale_box([0, 0, 640, 480], (640, 480), (112, 84)) == [0, 0, 112, 84]
    assert common.scale_box([64, 48, 320, 240], (640, 480), (112, 84)) == [11, 8, 56, 42]
    assert common.scale_box([10, 20, 30, 40], (100, 100), (200, 50)) == [20, 10, 60, 20]  # each axis by its own factor


@pytest.mark.parametrize(
    "box,valid",
    [([1, 2, 3, 4], True), ((1, 2, 3, 4), True), ([0.5, 0, 1, 1.5], True), ([3, 2, 1, 4], False), ([1, 4, 3, 2], False),
     ([1, 2, 1, 4], False), ([1, 2, 3], False), ([1, 2, 3, 4, 5], False), ([1, 2, 3, float("nan")], False),
     ([1, 2, 3, float("inf")], False), ([1, 2, 3, "4"], False), ([1, 2, 3, None], False), (None, False),
     ("1234", False)],
)  # fmt: skip
def test_valid_box(box, valid):
    assert common.valid_box(box) is valid


def test_boxes_for_the_model_are_pixels_of_the_resized_picture(backbone, processor, ladder_data):
    """Pictures of both colour sizes of ScanNet; the label and the order of the keys stay."""
    examples = {e.images[0].split("/")[-2]: e for e in common.read_examples(ladder_data, "locate")}
    assert len(examples) == 2
    for example in examples.values():
        with Image.open(example.images[0]) as image:
            width, height = image.size
        assert common.resized_size(processor, width, height) == (112, 84)
        for before, after in zip(example.answer, common.boxes_for_model(backbone, example), strict=True):
            factors = np.array([112 / width, 84 / height] * 2)
            assert after["bbox_2d"] == np.round(before["bbox_2d"] * factors).tolist()
            assert list(after) == ["bbox_2d", "label"] and after["label"] == before["label"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_boxes_of_other_families_are_thousandths_of_the_picture(tiny_models, ladder_data, family):
    """Whatever the picture is resized to; each side keeps at least one unit. What is learnt is what scores 1."""
    backbone = common.load_backbone(tiny_models(family), "fp32")
    for example in common.read_examples(ladder_data, "locate"):
        width, height = common.picture_size(example.images[0])
        before, example.answer = example.answer, common.boxes_for_model(backbone, example)
        for old, new in zip(before, example.answer, strict=True):
            factors = np.array([1000 / width, 1000 / height] * 2)
            assert new["bbox_2d"] == np.round(old["bbox_2d"] * factors).tolist() and new["label"] == old["label"]
        assert common.score_answers([common.boxes_text(example.answer)], [example])[0] == [1.0]
    example.answer = [{"bbox_2d": [0, 0, width, height], "label": "room"}, {"bbox_2d": [0, 0, 0.1, 0.1], "label": "point"}]
    assert [box["bbox_2d"] for box in common.boxes_for_model(backbone, example)] == [[0, 0, 1000, 1000], [0, 0, 1, 1]]


@pytest.mark.parametrize("family, box", [("qwen2_5_vl", [28, 28, 84, 56]), ("qwen3_vl", [250, 250, 750, 500])])
def test_drawn_boxes_lie_where_the_model_meant_them(backbone, tmp_path, family, box):
    """In a black picture of 112 x 112 pixels, from 28 to 84 and from 28 to 56; boxes.png is three times as large."""
    Image.new("RGB", (112, 112)).save(tmp_path / "a.png")
    backbone.family, answer = common.FAMILIES[family], [{"bbox_2d": box, "label": "cube"}]
    row = {"model": "m", "id": "spld:1", "mode": "locate", "question_type": "locate", "images": [str(tmp_path / "a.png")],
           "answer": answer, "text": common.boxes_text(answer), "temperature": 0.0, "score": 1.0, "question": "q",
           "options": None}  # fmt: skip
    report.draw_boxes([row], tmp_path / "boxes.png", ["m"], backbone)
    sheet = np.asarray(Image.open(tmp_path / "boxes.png"))
    for top in (0, 336 + 6):  # the truth, and the model
        rows, columns = (sheet[top : top + 336, :336] == (255, 165, 0)).all(-1).nonzero()
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == (84, 84, 251, 167)
    item = SimpleNamespace(example=SimpleNamespace(id="spld:1", data_type="single_image"))
    (card,) = report.report_answers([row], {"spld:1": item}, {}, backbone, {})
    assert card["pictures"] == [(0, [("truth", "cube", 28, 28, 84, 56), ("answer", "cube", 28, 28, 84, 56)])]

    # Of several pictures: the truth in the second, the answer in the first. boxes.png has no place for it.
    Image.new("RGB", (112, 112)).save(tmp_path / "b.png")
    row |= {"images": [str(tmp_path / "a.png"), str(tmp_path / "b.png")], "answer": [answer[0] | {"picture": 2}]}
    item.example.data_type = "multi_view"
    (card,) = report.report_answers([row], {"spld:1": item}, {}, backbone, {})
    assert card["pictures"] == [(0, [("answer", "cube", 28, 28, 84, 56)]), (1, [("truth", "cube", 28, 28, 84, 56)])]
    report.draw_boxes([row], tmp_path / "none.png", ["m"], backbone)
    assert not (tmp_path / "none.png").exists()


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def test_load_image_gives_rgb(tmp_path):
    for mode, name in (("L", "grey.png"), ("RGBA", "clear.png"), ("P", "palette.png"), ("RGB", "plain.jpg")):
        Image.new(mode, (30, 20)).save(tmp_path / name)
        image = common.load_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (30, 20)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut", "folder"])
def test_load_image_names_the_file_that_it_cannot_read(tmp_path, photo, kind):
    path = tmp_path / "bad picture.jpg"
    if kind == "text":
        path.write_text("this is not a picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        photo(200, 200).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(SystemExit, match="bad picture.jpg"):
        common.load_image(path)


def write_mp4(path, pictures):
    """The smallest mp4 that is one: a header around frames that are JPEG files, since nothing here encodes video."""

    def box(kind, *parts):
        body = b"".join(parts)
        return struct.pack(">I4s", 8 + len(body), kind) + body

    def words(*values):
        return struct.pack(f">{len(values)}I", *values)

    frames = []
    for picture in pictures:
        frames.append(io.BytesIO())
        picture.save(frames[-1], "jpeg", quality=95)
    frames = [frame.getvalue() for frame in frames]
    count, (width, height) = len(frames), pictures[0].size
    matrix = words(65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    kind = box(b"ftyp", b"isom\0\0\2\0isommp41")
    jpeg = box(b"esds", bytes(4), b"\x03\x12\0\1\0", b"\x04\x0d\x6c\x11", bytes(11))  # object type 6c: JPEG
    size = struct.pack(">H16xHHIIIH", 1, width, height, 72 << 16, 72 << 16, 0, 1)
    entry = box(b"mp4v", bytes(6), size, bytes(32), struct.pack(">Hh", 24, -1), jpeg)
    table = box(
        b"stbl", box(b"stsd", words(0, 1), entry), box(b"stts", words(0, 1, count, 1)),
        box(b"stsc", words(0, 1, 1, count, 1)), box(b"stsz", words(0, 0, count, *map(len, frames))),
        box(b"stco", words(0, 1, len(kind) + 8)),
    )  # fmt: skip
    here = box(b"dinf", box(b"dref", words(0, 1), box(b"url ", words(1))))
    media = box(
        b"mdia", box(b"mdhd", words(0, 0, 0, 10, count, 0)), box(b"hdlr", words(0, 0), b"vide", bytes(13)),
        box(b"minf", box(b"vmhd", words(1, 0, 0)), here, table),
    )  # fmt: skip
    head = box(b"tkhd", words(7, 0, 0, 1, 0, count), bytes(16), matrix, words(width << 16, height << 16))
    movie = box(b"mvhd", words(0, 0, 0, 10, count, 65536), bytes(12), matrix, bytes(24), words(2))
    path.write_bytes(kind + box(b"mdat", *frames) + box(b"moov", movie, box(b"trak", head, media)))


def test_read_video_picks_equal_steps_with_the_first_and_the_last(tmp_path):
    """21 frames of rising brightness: the brightness of a frame is its number."""
    pytest.importorskip("decord")
    write_mp4(tmp_path / "a.mp4", [Image.new("RGB", (64, 48), (10 * n, 10 * n, 10 * n)) for n in range(21)])

    def numbers(frames):
        pictures = common.read_video(tmp_path / "a.mp4", frames)
        assert all(picture.size == (64, 48) and picture.mode == "RGB" for picture in pictures)
        return [round(float(np.asarray(picture).mean()) / 10) for picture in pictures]

    assert numbers(5) == [0, 5, 10, 15, 20]
    assert numbers(2) == [0, 20]
    assert numbers(21) == numbers(100) == list(range(21))
    assert numbers(16) == [round(20 * n / 15) for n in range(16)]
