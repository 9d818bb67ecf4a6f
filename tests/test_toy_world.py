"""The toy world against slow independent checks: rays marched in small steps, masks counted, geometry by hand."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

import stage0_data
from support import report, scannet, toy_world

STEP = 0.002  # metres of depth between two samples of a marched ray


def solid(shape, size, x, y, yaw=0.0, colour="red"):
    return {"shape": shape, "colour": colour, "size": size, "x": x, "y": y, "yaw": yaw}


def room_of(*solids, yaws=(0.0,)):
    cameras = [toy_world.toy_camera(yaw) for yaw in yaws]
    return {"solids": list(solids), "cameras": cameras, "numbers": range(0, 20 * len(yaws), 20), "half": (2.5, 2.5),
            "floor": [150, 150, 150]}  # fmt: skip


def written(room, folder, seed=0):
    """The room after its way through the disk: write_room, then read_scannet."""
    toy_world.write_labels(folder / "labels.tsv")
    toy_world.write_room(room, folder / "scene0000_00", random.Random(seed))
    return stage0_data.read_scannet(folder / "scene0000_00", scannet.read_labels(folder / "labels.tsv"))


def inside(thing, points, grow=0.0):
    """Whether points (n, 3) lie in a solid, from what the solid IS: a turned box, a ball, a cone on the floor."""
    x, y, z = points[:, 0] - thing["x"], points[:, 1] - thing["y"], points[:, 2]
    half = thing["size"] / 2
    if thing["shape"] == "ball":
        return x**2 + y**2 + (z - half) ** 2 <= (half + grow) ** 2
    if thing["shape"] == "cone":
        return (z >= -grow) & (np.hypot(x, y) <= (thing["size"] - z) / 2 + grow)
    c, s = math.cos(thing["yaw"]), math.sin(thing["yaw"])
    along, across = c * x + s * y, c * y - s * x
    return (np.abs(along) <= half + grow) & (np.abs(across) <= half + grow) & (np.abs(z - half) <= half + grow)


def marched(room, camera, column, row, grow=0.0):
    """(instance, depth) at a pixel: the first sample of its ray that lies in a solid or beyond the room."""
    x, y = (column - (toy_world.SIDE - 1) / 2) / toy_world.FOCAL, (row - (toy_world.SIDE - 1) / 2) / toy_world.FOCAL
    ray = x * camera[:3, 0] + y * camera[:3, 1] + camera[:3, 2]
    depth = np.arange(0, 14, STEP)
    points = camera[:3, 3] + depth[:, None] * ray
    # It leaves through the floor or a wall seen from inside; a wall it starts behind, and moves away from, is not met.
    side = np.sign(ray[:2])
    ahead = side * camera[:2, 3] < room["half"]
    left = (points[:, 2] < 0) | ((side * points[:, :2] > room["half"]) & ahead).any(1)
    first, instance = int(left.argmax()), 0
    for number, thing in enumerate(room["solids"], 1):
        within = inside(thing, points, grow)
        if within.any() and within.argmax() < first:
            first, instance = int(within.argmax()), number
    return instance, depth[first]


@pytest.mark.parametrize("make", [toy_world.make_room, toy_world.make_tour])
def test_masks_and_depths_equal_those_of_rays_marched_in_small_steps(make):
    kept = asked = 0
    for seed in range(15):
        rng = random.Random(seed)
        room = make(rng)
        camera = rng.choice(room["cameras"])
        _, depth, instance = toy_world.render(room, camera)
        # Half of the pixels where the solids are, so that the floor does not win by numbers.
        on = [tuple(place) for place in np.argwhere(instance)]
        anywhere = [(rng.randrange(toy_world.SIDE), rng.randrange(toy_world.SIDE)) for _ in range(12)]
        for row, column in rng.sample(on, min(len(on), 12)) + anywhere:
            asked += 1
            found, there = marched(room, camera, column, row)
            # A ray that grazes an edge is undecided at this step: growing the solids by a hair changes what it meets.
            if marched(room, camera, column, row, STEP)[0] != marched(room, camera, column, row, -STEP)[0]:
                continue
            kept += 1
            assert instance[row, column] == found
            assert there - STEP - 1e-9 <= depth[row, column] <= there + 1e-9
    assert kept >= 0.95 * asked


@pytest.mark.parametrize("shape", toy_world.SHAPES)
def test_each_shape_alone_has_the_marched_mask_along_its_outline(shape):
    room = room_of(solid(shape, 1.1, 0.4, -0.3, 0.5), yaws=(0.2,))
    _, _, instance = toy_world.render(room, room["cameras"][0])
    mask = instance == 1
    edge = mask ^ np.roll(mask, 1, axis=1)  # where the outline crosses a row
    places = np.argwhere(edge)
    assert len(places) > 20
    for row, column in places:
        votes = {marched(room, room["cameras"][0], column, row, grow)[0] for grow in (-STEP, STEP)}
        assert len(votes) == 2 or votes == {instance[row, column]}


def test_every_depth_is_positive_and_not_beyond_the_room():
    for seed in range(6):
        room = toy_world.make_room(random.Random(seed))
        for camera in room["cameras"]:
            depth = toy_world.render(room, camera)[1]
            assert depth.min() > 0 and depth.max() < 14


def test_depth_of_the_floor_by_hand():
    room = room_of()
    _, depth, instance = toy_world.render(room, room["cameras"][0])
    for row in (40, 70, 100):
        down = (row - (toy_world.SIDE - 1) / 2) / toy_world.FOCAL
        drop = math.sin(toy_world.PITCH) + math.cos(toy_world.PITCH) * down  # metres down for a metre of depth
        assert np.allclose(depth[row, 30:80], toy_world.CAMERA_HEIGHT / drop)
    assert not instance.any()


def test_what_is_nearer_hides_what_is_farther():
    near, far = solid("cube", 1.0, 0, -0.6), solid("cube", 1.0, 0, 0.5, colour="blue")
    camera = toy_world.toy_camera(0.0)
    masks = [toy_world.render(room_of(*order), camera)[2] for order in ((near, far), (far, near))]
    alone = [toy_world.render(room_of(thing), camera)[2] == 1 for thing in (near, far)]
    both = alone[0] & alone[1]
    assert both.any()
    assert (masks[0][both] == 1).all() and (masks[1][both] == 2).all()


def test_camera_stands_behind_the_middle_and_looks_down_at_the_pitch():
    pose = toy_world.toy_camera(0.0)
    assert np.allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3)) and np.isclose(np.linalg.det(pose[:3, :3]), 1)
    assert np.allclose(pose[:3, 3], [0, -toy_world.CAMERA_BACK, toy_world.CAMERA_HEIGHT])
    assert np.allclose(pose[:3, 0], [1, 0, 0])
    assert np.allclose(pose[:3, 2], [0, math.cos(toy_world.PITCH), -math.sin(toy_world.PITCH)])
    assert pose[2, 1] < 0  # the picture's y axis points down
    quarter = toy_world.toy_camera(math.pi / 2)  # from the side of +x, looking along -x
    assert np.allclose(quarter[:2, 3], [toy_world.CAMERA_BACK, 0]) and quarter[0, 2] < 0


def test_project_equals_a_pixel_computed_by_hand():
    intrinsics = np.array([[100.0, 0, 50], [0, 80.0, 40], [0, 0, 1]])
    u, v, z = stage0_data.project(np.array([[0.2, -0.1, 2.0]]), np.eye(4), intrinsics)
    assert np.allclose([u[0], v[0], z[0]], [60, 36, 2])
    # A level camera at (1, 2, 3) that looks along +x: its right is -y, its down -z.
    pose = np.eye(4)
    pose[:3, :3] = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]).T
    pose[:3, 3] = [1, 2, 3]
    u, v, z = stage0_data.project(np.array([[5.0, 2, 3], [5, 1, 3], [5, 2, 2]]), pose, intrinsics)
    assert np.allclose(u, [50, 75, 50]) and np.allclose(v, [40, 40, 60]) and np.allclose(z, 4)


def test_a_point_behind_the_camera_has_no_pixel_and_no_box(tmp_path):
    u, v, z = stage0_data.project(np.array([[0.5, 0.5, -2.0]]), np.eye(4), toy_world.toy_intrinsics())
    assert z[0] == -2 and np.isfinite([u[0], v[0]]).all()
    room = written(room_of(solid("ball", 0.8, 0, 0)), tmp_path)
    frame = room.frames[0]
    assert set(stage0_data.visible_boxes(room, frame)[0]) == {2}
    behind = frame.pose[:3, 3] - 3 * frame.pose[:3, 2]
    room.objects[0].points = room.objects[0].points - room.objects[0].points.mean(0) + behind
    assert stage0_data.visible_boxes(room, frame)[0] == {}


def test_boxes_of_unhidden_solids_are_the_bounds_of_their_masks(tmp_path):
    toy_world.write_labels(tmp_path / "labels.tsv")
    labels, gaps = scannet.read_labels(tmp_path / "labels.tsv"), []
    for seed in range(24):
        rng = random.Random(f"boxes {seed}")
        room = (toy_world.make_tour if seed % 2 else toy_world.make_room)(rng)
        folder = tmp_path / f"scene{seed:04d}_00"
        toy_world.write_room(room, folder, rng)
        read = stage0_data.read_scannet(folder, labels)
        for camera, frame in zip(room["cameras"], read.frames):
            boxes, instance = stage0_data.visible_boxes(read, frame)[0], toy_world.render(room, camera)[2]
            for number, thing in enumerate(room["solids"], 1):
                alone = toy_world.render(room | {"solids": [thing]}, camera)[2] == 1
                inner = alone[1:-1, 1:-1].sum() == alone.sum() > 0  # it is in the picture, and not cut by its border
                if inner and (alone == (instance == number)).all():
                    rows, columns = np.nonzero(alone)
                    bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    gaps += np.abs(np.subtract(bounds, boxes[number + 1])).tolist()  # the floor is instance 1
    assert len(gaps) > 500
    assert max(gaps) <= 1
    assert np.mean(np.array(gaps) == 0) >= 0.9  # .95 on average: vertices are not pixel centres


def test_a_hidden_solid_is_not_visible_but_is_from_the_other_side(tmp_path):
    room = room_of(solid("cube", 1.6, 0, -0.4), solid("ball", 0.3, 0, 0.62, colour="blue"), yaws=(0.0, math.pi))
    hidden, shown = (toy_world.render(room, camera)[2] == 2 for camera in room["cameras"])
    assert not hidden.any() and shown.any()  # the two premises of this test
    read = written(room, tmp_path)
    assert [thing.label for thing in read.objects] == ["red cube", "blue ball"]
    assert [set(stage0_data.visible_boxes(read, frame)[0]) for frame in read.frames] == [{2}, {2, 3}]


def test_the_box_of_a_half_hidden_solid_stops_at_what_hides_it(tmp_path):
    front, back = solid("cube", 1.2, 0, -0.5), solid("cube", 1.2, 0, 1.15, colour="blue")
    both, alone = tmp_path / "both", tmp_path / "alone"
    for folder in (both, alone):
        folder.mkdir()
    read, free = written(room_of(front, back), both), written(room_of(back), alone)
    mask = toy_world.render(room_of(front, back), toy_world.toy_camera(0.0))[2] == 2
    whole = toy_world.render(room_of(back), toy_world.toy_camera(0.0))[2] == 1
    assert 0.3 < mask.sum() / whole.sum() < 0.95
    cut, full = stage0_data.visible_boxes(read, read.frames[0])[0][3], stage0_data.visible_boxes(free, free.frames[0])[0][2]
    assert cut[3] < full[3] and cut[:3] == full[:3]  # its foot is hidden, its top and sides are not


def test_reading_gives_back_the_aligned_world(tmp_path):
    room = toy_world.make_room(random.Random(5))
    read = written(room, tmp_path)
    mesh = PlyData.read(tmp_path / "scene0000_00" / "scene0000_00_vh_clean_2.ply")["vertex"]
    raw, start = np.stack([mesh["x"], mesh["y"], mesh["z"]], 1), 121  # the floor's vertices come first
    assert len(read.objects) == len(room["solids"])
    for thing, made in zip(read.objects, room["solids"]):
        wanted = toy_world.solid_points(made)
        assert thing.label == f"{made['colour']} {made['shape']}"
        assert np.abs(thing.points - wanted).max() < 1e-3
        # The file itself holds another, turned and moved, world: otherwise this test would show nothing.
        assert np.abs(raw[start : start + len(wanted)] - wanted).max() > 0.1
        start += len(wanted)
    for frame, camera in zip(read.frames, room["cameras"]):
        assert np.abs(frame.pose - camera).max() < 1e-6
    assert [frame.number for frame in read.frames] == [20 * number for number in range(len(room["cameras"]))]


TOURS = [toy_world.make_tour(random.Random(f"tour {seed}")) for seed in range(20)]


def angle_of(camera):
    """The horizontal angle in which a camera looks, in degrees, counter-clockwise from +x seen from above."""
    return math.degrees(math.atan2(camera[1, 2], camera[0, 2]))


def test_the_camera_of_a_tour_turns_to_the_right_by_quarters_and_a_little_more_for_the_second_frame():
    for room in TOURS:
        assert list(room["numbers"]) == [0, 20, 60, 80, 120, 140, 180, 200]
        start = angle_of(room["cameras"][0])
        turned = [(start - angle_of(camera)) % 360 for camera in room["cameras"]]  # to the right: clockwise
        assert np.allclose(np.subtract(turned[1:], [8, 90, 98, 180, 188, 270, 278]), 0)
        for camera in room["cameras"]:
            assert np.allclose(camera[:3, 3], [0, 0, toy_world.CAMERA_HEIGHT])


def test_each_quarter_of_a_tour_looks_straight_at_a_wall_of_its_own_colour():
    for room in TOURS:
        for quarter, camera in enumerate(room["cameras"][::2]):
            colour, depth, _ = toy_world.render(room | {"solids": []}, camera)
            assert (colour[0] == toy_world.WALLS[("white", "beige", "brown", "grey")[quarter]]).all()
            floor = (colour == room["floor"]).all(-1)
            assert (floor == floor[:, :1]).all() and not floor[0].any() and floor[-1].all()  # a level edge
            # The edge is where a ray down to the floor goes as far as the wall: row and distance by hand.
            below = math.pi / 3 + math.atan((floor[:, 0].argmax() - 0.5 - (toy_world.SIDE - 1) / 2) / toy_world.FOCAL)
            wall = room["half"][1 - quarter % 2]
            assert abs(toy_world.CAMERA_HEIGHT / math.tan(below) - wall) < 0.12


def test_every_solid_of_a_tour_is_whole_in_one_first_frame_and_outside_the_other_three():
    shared = 0
    for room in TOURS:
        places = []
        for thing in room["solids"]:
            frames = [toy_world.render(room | {"solids": [thing]}, camera)[2] == 1 for camera in room["cameras"]]
            masks = frames[::2]
            (place,) = [place for place, mask in enumerate(masks) if mask.any()]
            assert {number // 2 for number, mask in enumerate(frames) if mask.any()} == {place}  # nor in other second frames
            rows, columns = np.nonzero(masks[place])
            assert min(rows.min(), columns.min()) >= 1 and max(rows.max(), columns.max()) <= toy_world.SIDE - 2
            places.append(place)
        assert len(set(places)) >= min(4, len(places))
        shared += len(set(places)) < len(places)
        for a, b in itertools.combinations(room["solids"], 2):
            assert math.dist((a["x"], a["y"]), (b["x"], b["y"])) > (a["size"] + b["size"]) / 2
        for axis, half in zip("xy", room["half"]):
            assert all(abs(thing[axis]) + thing["size"] / 2 < half for thing in room["solids"])
    assert shared > 0


def test_solids_are_repeated_in_tours_only():
    def repeats(room):
        names = [(thing["colour"], thing["shape"]) for thing in room["solids"]]
        return len(names) - len(set(names))

    rooms = [toy_world.make_room(random.Random(f"small {seed}")) for seed in range(5)]
    assert not any(map(repeats, rooms)) and all(len({thing["colour"] for thing in r["solids"]}) == len(r["solids"]) for r in rooms)
    assert {repeats(room) for room in TOURS} >= {0, 1, 2}


def test_a_tour_is_read_back_with_its_frames_and_the_area_of_its_floor(tmp_path):
    areas = []
    for number, room in enumerate(TOURS[:6]):
        (tmp_path / str(number)).mkdir()
        read = written(room, tmp_path / str(number))
        assert [frame.number for frame in read.frames] == list(toy_world.TOUR)
        assert all(np.abs(frame.pose - camera).max() < 1e-6 for frame, camera in zip(read.frames, room["cameras"]))
        x, y = room["half"]
        # Vertices are rounded to a grid of 5 cm: each of the four walls moves by at most half of it.
        assert (2 * x - 0.05) * (2 * y - 0.05) - 1e-6 <= read.floor_area <= (2 * x + 0.05) * (2 * y + 0.05) + 1e-6
        areas.append(read.floor_area)
    assert max(areas) > 1.5 * min(areas)


def test_vertices_lie_on_their_solid_and_reach_its_outline():
    rng = random.Random(1)
    for shape in toy_world.SHAPES:
        thing = solid(shape, 1.3, rng.uniform(-1, 1), rng.uniform(-1, 1), 0.4)
        points = toy_world.solid_points(thing)
        assert inside(thing, points, 1e-6).all() and not inside(thing, points, -1e-6).any()
        assert np.isclose(points[:, 2].min(), 0) and np.isclose(points[:, 2].max(), 1.3)


def test_frames_without_a_finite_pose_and_structural_labels_are_skipped(tmp_path):
    room = room_of(solid("cube", 1.0, 0, 0), yaws=(0.0, 1.0, 2.0))
    written(room, tmp_path)
    folder = tmp_path / "scene0000_00"
    (folder / "pose" / "20.txt").write_text("-inf -inf -inf -inf\n" * 4)
    (folder / "depth" / "40.png").unlink()
    groups = json.loads((folder / "scene0000_00.aggregation.json").read_text())
    groups["segGroups"].append({"objectId": 7, "segments": [1], "label": "no such label"})
    (folder / "scene0000_00.aggregation.json").write_text(json.dumps(groups))
    read = stage0_data.read_scannet(folder, scannet.read_labels(tmp_path / "labels.tsv"))
    assert [frame.number for frame in read.frames] == [0]
    assert [thing.label for thing in read.objects] == ["red cube"]


def test_a_missing_scan_file_is_named(tmp_path):
    written(room_of(solid("cube", 1.0, 0, 0)), tmp_path)
    folder = tmp_path / "scene0000_00"
    (folder / "scene0000_00.aggregation.json").unlink()
    with pytest.raises(SystemExit, match="aggregation.json is missing"):
        stage0_data.read_scannet(folder, scannet.read_labels(tmp_path / "labels.tsv"))


def test_depth_pictures_hold_millimetres(tmp_path):
    room = room_of(solid("ball", 1.0, 0.5, 0.5))
    written(room, tmp_path)
    stored = np.asarray(Image.open(tmp_path / "scene0000_00" / "depth" / "0.png"))
    assert stored.dtype == np.uint16
    assert np.abs(stored / 1000 - toy_world.render(room, room["cameras"][0])[1]).max() <= 0.00051


def test_sides_of_a_turned_rectangle_are_its_sides():
    rng = np.random.default_rng(0)
    for angle in np.linspace(0.05, 3.0, 12):
        points = rng.uniform(-0.5, 0.5, (60, 3)) * [2.0, 0.7, 1.2]
        corners = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-0.35, 0.35) for z in (-0.6, 0.6)])
        c, s = math.cos(angle), math.sin(angle)
        turned = np.concatenate([points, corners]) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [3, -1, 2]
        sides = stage0_data.upright_box(turned)[2]
        assert np.allclose(sorted(sides[:2]), [0.7, 2.0]) and np.isclose(sides[2], 1.2)
    line = np.array([[0.0, 0, 0], [0, 1, 0], [0, 3, 2]])  # no area: the hull does not exist
    assert sorted(stage0_data.upright_box(line)[2]) == [0, 2, 3]


def test_longest_side_of_every_solid_is_its_size():
    for shape in toy_world.SHAPES:
        for yaw in (0.0, 0.3, 1.2):
            assert np.isclose(stage0_data.upright_box(toy_world.solid_points(solid(shape, 0.9, 1, 2, yaw)))[2].max(), 0.9)


def object_of(points):
    return stage0_data.Object(1, "", points, *stage0_data.upright_box(points))


def test_closest_distance_equals_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.normal(size=(40, 3)), rng.normal(size=(25, 3)) + rng.uniform(0, 4, 3)
        brute = min(math.dist(p, q) for p in a for q in b)
        pair = object_of(a), object_of(b)
        for order in (pair, pair[::-1]):
            assert np.isclose(stage0_data.closest_distance(*order), brute)


def test_signs_of_camera_offset_by_hand():
    def thing(x, y):
        return object_of(np.array([[x - 0.1, y - 0.1, 0], [x + 0.1, y + 0.1, 1]]))

    ahead = toy_world.toy_camera(0.0)  # looks along +y, right is +x
    assert np.allclose(stage0_data.camera_offset(thing(1, 0), thing(0, 0), ahead), (1, 0))
    assert np.allclose(stage0_data.camera_offset(thing(0, 2), thing(0, 0.5), ahead), (0, 1.5))  # front = farther
    assert np.allclose(stage0_data.camera_offset(thing(0, 0), thing(1, 2), ahead), (-1, -2))
    side = toy_world.toy_camera(math.pi / 2)  # looks along -x, right is +y
    assert np.allclose(stage0_data.camera_offset(thing(0, 1), thing(0, 0), side), (1, 0))
    assert np.allclose(stage0_data.camera_offset(thing(-1, 0), thing(0, 0), side), (0, 1))


def test_the_vision_task_sees_both_frames_of_a_pair_and_the_colours_of_its_patches(backbone, photo, tmp_path):
    task = toy_world.VisionTask(backbone.model, backbone.tokenizer, backbone.processor)
    (tmp_path / "images").mkdir()
    for number in range(3):
        photo(toy_world.SIDE, toy_world.SIDE, number).save(tmp_path / "images" / f"{number}.png")
    names = [["0.png"], ["0.png", "0.png"], ["0.png", "1.png"], ["0.png", "2.png"]]
    with torch.no_grad():
        *outputs, colours, _ = task([{"image": some} for some in names], tmp_path)
    for found in outputs:  # cells, names, boxes
        assert found.shape[:2] == (4, 16) and torch.allclose(found[0], found[1], atol=1e-5)  # a still picture fills both halves
        assert all((found[2] - found[other]).abs().amax(-1).min() > 1e-4 for other in (0, 3))  # only the second frame differs
    mean, std = np.array(backbone.processor.image_mean), np.array(backbone.processor.image_std)
    for some, row in zip(names, colours.numpy()):
        frames = [(np.asarray(Image.open(tmp_path / "images" / name)) / 255 - mean) / std for name in (some[0], some[-1])]
        for token in range(16):
            y, x = 28 * (token // 4), 28 * (token % 4)
            patches = [(y + down, x + right) for down in (0, 14) for right in (0, 14)]
            wanted = [frame[top : top + 14, left : left + 14, channel].mean()
                      for top, left in patches for channel in range(3) for frame in frames]  # fmt: skip
            assert np.allclose(row[token], wanted, atol=1e-5)


@pytest.mark.parametrize("backbone_name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_vision_task_has_digits_for_a_box_at_the_border(photo, tmp_path, backbone_name):
    """112 of 112 pixels are 1,000 in Qwen3-VL's units: more than three digits."""
    tokenizer = toy_world.build_tokenizer([" ".join([*toy_world.NAMES, *toy_world.WALLS])])
    model = toy_world.build_model(tokenizer, 0, backbone_name)
    (tmp_path / "images").mkdir()
    photo(toy_world.SIDE, toy_world.SIDE).save(tmp_path / "images" / "0.png")
    task = toy_world.VisionTask(model, tokenizer, toy_world.build_processor(model))
    row = {"image": ["0.png"], "objects": [{"label": "red cube", "bbox_2d": [84, 84, 112, 112]}]}
    assert task.loss([row], tmp_path).isfinite()


def test_the_vision_task_knows_the_wall_of_a_picture_or_of_the_first_frame(backbone, tmp_path):
    (tmp_path / "images").mkdir()
    room = TOURS[0]
    for number, camera in enumerate(room["cameras"]):
        Image.fromarray(toy_world.render(room, camera)[0]).save(tmp_path / "images" / f"{number}.jpg", quality=95)
    task = toy_world.VisionTask(backbone.model, backbone.tokenizer, backbone.processor)
    names = [["4.jpg"], ["0.jpg"], ["6.jpg", "7.jpg"], ["2.jpg", "3.jpg"], ["2.jpg", "1.jpg"]]
    with torch.no_grad():
        walls = task([{"image": some} for some in names], tmp_path)[-1]
    assert [[*toy_world.WALLS][wall] for wall in walls] == ["brown", "white", "grey", "beige", "beige"]


def test_the_gallery_draws_all_pictures_of_a_row_also_where_the_first_shows_nothing(tmp_path):
    """A quarter of a tour may be empty: such a picture has no row in objects.jsonl. Views lie in a grid, a depth picture on top."""
    row = {"question": "How many?", "options": None, "answer": "2", "question_type": "object count", "data_type": "multi_view",
           "image": ["0.jpg", "1.jpg", "2.jpg", "3.png"]}  # fmt: skip
    shown = {"image": ["1.jpg"], "objects": [{"label": "red cube", "bbox_2d": [30, 32, 50, 60]}]}
    (tmp_path / "images").mkdir()
    for name, colour in zip(row["image"], ("black", "red", "lime", "blue")):
        Image.new("RGB", (112, 112), colour).save(tmp_path / "images" / name)
    (tmp_path / "spld_spatial_data.jsonl").write_text(json.dumps(row))
    (tmp_path / "objects.jsonl").write_text(json.dumps(shown))
    sheet = np.asarray(report.draw_gallery(tmp_path, 0)).astype(int)
    places = {(80, 80): (0, 0, 0), (150, 200): (255, 0, 0), (250, 80): (0, 255, 0), (20, 300): (0, 0, 255)}  # row, column
    for (y, x), colour in places.items():
        assert np.abs(sheet[y, x] - colour).max() <= 3
    assert (sheet[48:90, 170:330] == 255).all(-1).any()  # the white box
