"""Read a scan of ScanNet with exported frames into arrays. Every fault is a SystemExit that names the file.

A scan is a folder scans/<id> with a mesh, its segments and objects, color/, depth/, pose/, intrinsic/ and <id>.txt. stage0_data.py
builds a Room from the arrays; toy_world.py writes the toy's rooms as such folders.
"""

import json
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from plyfile import PlyData

from support import files, jobs

DROPPED_NYU40 = {0, 1, 2, 22, 38, 39, 40}  # none, wall, floor, ceiling, otherstructure, otherfurniture, otherprop
LABELS = "scannetv2-labels.combined.tsv"
# Numbers of the rooms in ScanNet v2's 312 validation scans (scene%04d_*), on which the benchmarks are built.
VALIDATION = {int(number) for number in """
11 15 19 25 30 46 50 63 64 77 81 84 86 88 95 100 131 139 144 146 149 153 164 169 187 193 196 203 207 208 217 221 222 231 246
249 251 256 257 277 278 300 304 307 314 316 328 329 334 338 342 343 351 353 354 355 356 357 377 378 382 389 406 412 414 423
426 427 430 432 435 441 458 461 462 474 488 490 494 496 500 518 527 535 549 550 552 553 558 559 565 568 574 575 578 580 583
591 593 595 598 599 606 607 608 609 616 618 621 629 633 643 644 645 647 648 651 652 653 655 658 660 663 664 665 670 671 678
684 685 686 689 690 693 695 696 697 699 700 701 702 704
""".split()}  # fmt: skip
KINDS = ("color", "depth")
NUMBERS = {"axisAlignment": 16, "depthShift": 1} | {  # the lines of <id>.txt that are read: how many numbers they have
    name.format(kind): 1 for kind in KINDS for name in ("{}Width", "{}Height", "fx_{}", "fy_{}", "mx_{}", "my_{}")
}


@contextmanager
def reading(path):
    """Turn every error in reading a file of a scan into a SystemExit that names the file."""
    try:
        yield
    except Exception as error:  # broken files raise all kinds
        raise SystemExit(f"{path}: {error if type(error) is ValueError else repr(error)}") from None


def read_labels(path):
    """raw_category -> nyu40id from scannetv2-labels.combined.tsv (or the toy's table in the same format)."""
    if not Path(path).is_file():
        raise SystemExit(f"{path} is missing. It is part of ScanNet's download and lists all categories.")
    with reading(path):
        header, *rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        raw, nyu = header.index("raw_category"), header.index("nyu40id")
        return {row[raw]: int(row[nyu] or 0) for row in rows}


def numbered_files(folder, *suffixes):
    """{number: path} of the files <number><suffix> in a folder, also 000020. Raises SystemExit naming two with the same number."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.stem.isdecimal() and path.suffix.lower() in suffixes:
            other = found.setdefault(int(path.stem), path)
            if other != path:
                raise SystemExit(f"{path} and {other.name} have the same number. Remove one of them.")
    return found


def frame_files(folder):
    """({number: colour picture}, {number: depth picture}, units of depth in a metre) of a scan."""
    colors, depths = numbered_files(folder / "color", ".jpg", ".jpeg", ".png"), numbered_files(folder / "depth", ".png")
    return colors, depths, float(read_info(folder).get("depthShift", [1000])[0])


def check_scan(folder):
    """Raise SystemExit naming a file that scans/<id> lacks, and how to get it."""
    name = folder.name
    if not (folder / "color").is_dir() and (folder / f"{name}.sens").is_file():
        raise SystemExit(f"{folder}/{name}.sens cannot be read directly. Export its frames with ScanNet's SensReader: "
                         f"python reader.py --filename {name}.sens --output_path {folder} --export_color_images "
                         "--export_depth_images --export_poses --export_intrinsics")  # fmt: skip
    meshes = [f"{name}_vh_clean_2.ply", f"{name}_vh_clean_2.0.010000.segs.json", f"{name}.aggregation.json"]
    for part in (*meshes, "color", "depth", "pose", "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"):
        if not (folder / part).exists():
            raise SystemExit(f"{folder / part} is missing: export the frames and download the mesh of {name}.")


def read_info(folder):
    """The lines `key = value` of <id>.txt with a key in NUMBERS: {key: (n,)}. Empty if there is no such file."""
    path, info = folder / f"{folder.name}.txt", {}
    with reading(path):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            key, _, value = (part.strip() for part in line.partition("="))
            if key in NUMBERS:
                info[key] = np.array(value.split(), float)
                if len(info[key]) != NUMBERS[key] or not np.isfinite(info[key]).all():
                    raise ValueError(f"{key} = {value} is not {NUMBERS[key]} finite number(s).")
                if key != "axisAlignment" and info[key] <= 0:
                    raise ValueError(f"{key} = {value} is not positive.")
        if "axisAlignment" in info and not is_rigid(info["axisAlignment"].reshape(4, 4)):
            raise ValueError("axisAlignment is not a rotation and a shift.")
    return info


def is_rigid(matrix):
    """Whether a matrix (4, 4) moves without scaling or mirroring, up to 1 %."""
    turn = matrix[:3, :3]
    return np.allclose(matrix[3], [0, 0, 0, 1]) and np.allclose(turn @ turn.T, np.eye(3), atol=0.01) and np.linalg.det(turn) > 0


def read_pose(path):
    """Camera-to-world (4, 4) from a file, or a string: why the frame cannot be used."""
    try:
        pose = np.loadtxt(path)
    except ValueError:  # no numbers
        pose = np.empty(0)
    if pose.shape != (4, 4):
        return "frame without a 4x4 pose"
    if not np.isfinite(pose).all():
        return "frame without a finite pose"
    return pose if is_rigid(pose) else "frame with a pose that scales or mirrors"


def read_depth(path, shift):
    """A depth picture in metres (h, w), 0 where it is unknown. shift: its units in a metre."""
    with reading(path), Image.open(path) as image:
        return np.asarray(image, np.float64) / shift


def common_size(paths, kind):
    """(width, height) of the colour or depth pictures of a scan. Raises SystemExit naming a picture of another size, with an EXIF
    rotation, or (depth) without one channel of 16 bits."""
    first = None
    for path in paths:
        with reading(path), Image.open(path) as image:
            if kind == "depth" and not image.mode.startswith("I"):
                raise ValueError(f"this is no depth picture: its mode is {image.mode}, not one channel of 16 bits (millimetres).")
            if image.format == "JPEG" and image.getexif().get(0x0112, 1) != 1:
                raise ValueError("this picture has an EXIF rotation, so its pixels do not fit the intrinsics. Export it without.")
            first = first or (path.name, image.size)
            if image.size != first[1]:
                raise ValueError(f"this picture has {image.size} pixels, but {first[0]} has {first[1]}.")
    return first[1]


def fit_intrinsics(folder, kind, info, size):
    """Intrinsics (3, 3) for colour or depth pictures of size (width, height), and how they were scaled: {} if they were not.

    Exports of smaller pictures often keep the intrinsics of the recording. colorWidth and colorHeight of <id>.txt say which size
    intrinsic_color.txt is for (depth likewise). Without them, or if the file was scaled with the pictures, the principal point
    says it: it is within 5 % of the centre of pictures of the right size. Each axis has its own scale.
    Raises SystemExit naming the file if no size fits, the pictures were cropped or stretched, or <id>.txt says something else.
    """
    path = folder / "intrinsic" / f"intrinsic_{kind}.txt"
    with reading(path):
        whole = np.atleast_2d(np.loadtxt(path))
        matrix = whole[:3, :3]
        if whole.shape not in ((3, 3), (3, 4), (4, 4)) or not np.isfinite(matrix).all():
            raise ValueError("this is not a 3x3 or 4x4 matrix of finite numbers.")
        if min(matrix[0, 0], matrix[1, 1]) <= 0 or matrix[1, 0] or matrix[2].tolist() != [0, 0, 1]:
            raise ValueError("this is not a camera matrix with the rows [fx 0 cx], [0 fy cy] and [0 0 1].")
        width, height = f"{kind}Width", f"{kind}Height"
        told = (int(info[width][0]), int(info[height][0])) if width in info and height in info else None
        sizes = dict.fromkeys([told, size] if told else [size, (1296, 968), (640, 480)])  # the last two: ScanNet's recordings
        source = next((some for some in sizes if (np.abs((matrix[:2, 2] + 0.5) / some - 0.5) <= 0.05).all()), None)
        if source is None:
            raise ValueError(f"the principal point {matrix[:2, 2].tolist()} is not at the centre of pictures of "
                             f"{' or '.join(f'{w} x {h}' for w, h in sizes)} pixels. Were the pictures cropped?")  # fmt: skip
        for i, part in enumerate(("fx", "fy", "mx", "my")):
            value, side, key = matrix[i % 2, 2 if i > 1 else i], source[i % 2], f"{part}_{kind}"
            wanted = info[key][0] * side / (told or source)[i % 2] if key in info else value
            if abs(value - wanted) > 0.01 * (side if i > 1 else wanted):
                raise ValueError(f"{part} is {value:g}, but {key} of {folder.name}.txt makes it {wanted:g}.")
        scale = np.array(size) / source  # (2,)
        if scale.max() > 1.02 * scale.min():
            raise ValueError(f"this is for pictures of {source[0]} x {source[1]} pixels, but those in {kind}/ have another shape, "
                             f"{size[0]} x {size[1]}. Were they cropped?")  # fmt: skip
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixel centres are whole numbers: scale from the corner of the picture
    fitted = np.linalg.inv(half) @ np.diag([*scale, 1]) @ half @ matrix
    return fitted, {"from": list(source), "to": list(size), "scale": scale.round(4).tolist()} if (scale != 1).any() else {}


def read_objects(folder, points, labels, skipped):
    """[(number, label, vertices)] of the objects of a scan, whose mesh has the vertices `points` (n, 3). Structural categories are
    dropped; labels that the table lacks are counted in `skipped`. An object that is listed twice, with the same label and segments,
    counts once (in scene0217_00 all are). Raises SystemExit naming the file and the object if two objects share segments otherwise,
    because it is unknown whose they are; also for segments that the mesh lacks, as in files of another mesh."""
    path = folder / f"{folder.name}_vh_clean_2.0.010000.segs.json"
    with reading(path):
        segments = np.array(json.loads(path.read_text())["segIndices"])
        if len(segments) != len(points):
            raise ValueError(f"this has {len(segments)} entries, but the mesh has {len(points)} vertices.")
        if segments.ndim != 1 or segments.dtype.kind != "i" or segments.min(initial=0) < 0:
            raise ValueError("segIndices are not whole numbers from 0.")
        known = set(np.unique(segments).tolist())
    path = folder / f"{folder.name}.aggregation.json"
    seen = {}  # number: (label, segments)
    with reading(path):
        for group in json.loads(path.read_text())["segGroups"]:
            number, label, mine = group["objectId"], group["label"], frozenset(group["segments"])
            if label not in labels:
                skipped["label not in the table"] += 1
            if labels.get(label, 0) in DROPPED_NYU40:
                continue
            name = f"object {number} ({label})"
            if type(number) is not int or number < 0:
                raise ValueError(f"{name}: objectId is not a whole number from 0.")
            if not mine or not mine <= known:
                wrong = f"segments that no vertex has, such as {next(iter(mine - known))}" if mine else "no segments"
                raise ValueError(f"{name} has {wrong}. Do the files belong to the same mesh?")
            if (label, mine) in seen.values():
                skipped["object listed twice"] += 1
                continue
            others = [other for other, (_, some) in seen.items() if some & mine]
            if others or number in seen:
                raise ValueError(f"{name} shares {'segments' if others else 'its number'} with object {min(others or [number])}.")
            seen[number] = label, mine
    return [(number + 1, label, points[np.isin(segments, list(mine))]) for number, (label, mine) in seen.items()]


def read_scan(folder, labels):
    """Read scans/<id>, in the axis-aligned world. labels: from read_labels. Returns the vertices (n, 3) of the mesh, objects (see
    read_objects), frames [(number, colour picture, depth picture, camera-to-world (4, 4))] in order, and other fields of a Room.

    Frames without depth or without a pose that can be used are counted in `skipped`. Intrinsics are scaled to the size of the
    pictures. Raises SystemExit naming what is missing or does not fit.
    """
    skipped = Counter()
    check_scan(folder)
    info = read_info(folder)
    align = info.get("axisAlignment", np.eye(4)).reshape(4, 4)
    path = folder / f"{folder.name}_vh_clean_2.ply"
    with reading(path):
        vertices = PlyData.read(path)["vertex"]
        points = np.stack([vertices["x"], vertices["y"], vertices["z"]], 1).astype(np.float64) @ align[:3, :3].T + align[:3, 3]
        if not np.isfinite(points).all():
            raise ValueError("some vertices are not finite.")
    objects = read_objects(folder, points, labels, skipped)
    frames, poses, (colors, depths, depth_shift) = [], numbered_files(folder / "pose", ".txt"), frame_files(folder)
    for number, color in sorted(colors.items()):
        pose = read_pose(poses[number]) if number in poses else "frame without a finite pose"
        if isinstance(pose, str):
            skipped[pose] += 1
        elif number not in depths:
            skipped["frame without depth"] += 1
        else:
            frames.append((number, color, depths[number], align @ pose))
    if not frames:
        raise SystemExit(f"{folder}: no frame has color/<number>.jpg, depth/<number>.png and a usable pose/<number>.txt "
                         f"({', '.join(f'{count} x {reason}' for reason, count in skipped.items())}).")  # fmt: skip
    _, *pictures, _ = zip(*frames)
    sizes = [common_size(paths, kind) for paths, kind in zip(pictures, KINDS)]
    fitted = {kind: fit_intrinsics(folder, kind, info, size) for kind, size in zip(KINDS, sizes)}
    scaled = {kind: how for kind, (_, how) in fitted.items() if how}
    facts = {f"{kind}_intrinsics": matrix for kind, (matrix, _) in fitted.items()}
    return points, objects, frames, facts | {"skipped": skipped, "scaled": scaled, "depth_shift": depth_shift}


def second_picture(name, color, depth, depth_shift):
    """The picture that is made from a frame and has a name such as room/20_depth_5.png (depth in colours: dark blue is 0 m, yellow
    is 5 m or more, black is unknown) or room/20_crop_4_8_60_90.png (the box [4, 8, 60, 90] of the colour picture)."""
    kind, *numbers = Path(name).stem.split("_")[1:]
    if kind == "crop":
        with Image.open(color) as image:
            return image.convert("RGB").crop([int(number) for number in numbers])
    metres, far = read_depth(depth, depth_shift), float(numbers[0])
    ramp = [np.interp(metres, [0, far / 2, far], channel) for channel in ((20, 30, 250), (20, 150, 230), (110, 140, 30))]
    return Image.fromarray((np.stack(ramp, -1) * (metres > 0)[..., None]).round().astype(np.uint8))


def write_picture(target, colors, depths, depth_shift):
    """Write target, images/<room>/<frame>.jpg or a second picture made from this frame. colors, depths: {frame: path}. A copy that
    is there already is kept if its size and its time of change are those of the frame."""
    number, _, second = target.stem.partition("_")
    source, new = colors[int(number)], target.with_suffix(".new")
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.disk_errors(target):
        if second:
            second_picture(target, source, depths[int(number)], depth_shift).save(new, "PNG")
        elif source.suffix.lower() == ".png":
            with reading(source), Image.open(source) as image:
                image.convert("RGB").save(new, "JPEG", quality=95)
        elif target.is_file() and jobs.file_facts(target) == jobs.file_facts(source):
            return
        else:
            shutil.copy2(source, new)
        new.replace(target)

