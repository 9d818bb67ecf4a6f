"""Small rooms of boxes, written as ScanNet lays a scene out. What was written stays known: that is what the tests compare with."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from plyfile import PlyData, PlyElement

STEP = 0.07  # at most so many metres lie between neighbouring vertices of a face
NO_ROW = "zorp"  # a label that the table lacks
TABLE = {  # raw category -> nyu40 id
    "wall": 1, "floor": 2, "cabinet": 3, "bed": 4, "chair": 5, "office chair": 5, "sofa": 6, "table": 7, "bookshelf": 10,
    "lamp": 35, "trash can": 29, "monitor": 25, "safe": 29, "vent": 37, "stool": 5, "backpack": 29, "plant": 37,
    '<script>alert(1)</script>': 29, 'a"b&c': 29, "object": 40,
}  # fmt: skip


@dataclass
class Box:
    """A piece of furniture in the aligned world: label, middle, sides along its own axes, and yaw (counter-clockwise)."""

    label: str
    centre: tuple
    sides: tuple
    yaw: float
    points: np.ndarray = None  # (n, 3) its vertices as they were written
    number: int = 0

    def turned(self, inner):
        """Own coordinates (n, 3) -> the aligned world."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        x, y, z = np.asarray(inner, float).T
        return np.stack([c * x - s * y, s * x + c * y, z], 1) + self.centre

    def corners(self):
        half = np.array(self.sides) / 2
        return self.turned([(i * half[0], j * half[1], k * half[2]) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])


@dataclass
class Camera:
    """Where a camera stands, its yaw (counter-clockwise from x) and how far it looks down, in radians."""

    number: int
    place: tuple
    yaw: float
    down: float

    def matrix(self):
        """Camera (x right, y down, z forward) to the aligned world, (4, 4)."""
        level, up = np.array([math.cos(self.yaw), math.sin(self.yaw), 0]), np.array([0, 0, 1.0])
        forward = math.cos(self.down) * level - math.sin(self.down) * up
        right = np.array([math.sin(self.yaw), -math.cos(self.yaw), 0])
        out = np.eye(4)
        out[:3] = np.stack([right, np.cross(forward, right), forward, np.array(self.place)], 1)
        return out


@dataclass
class Made:
    """A scene as it was made. frames: the cameras that can be used, in order; depth: what their depth pictures hold."""

    name: str
    boxes: list
    frames: list
    size: tuple  # of the colour pictures
    color: np.ndarray
    depth_size: tuple
    depth_camera: np.ndarray
    area: float
    align: np.ndarray
    hidden: list = field(default_factory=list)  # labels that no picture shows
    depth: dict = field(default_factory=dict)


def intrinsics(size, focal, shift):
    return np.array([[focal, 0, (size[0] - 1) / 2 + shift], [0, focal * 1.01, (size[1] - 1) / 2 - shift], [0, 0, 1]])


def face_points(box):
    """Vertices on all six faces of a box, with its edges and corners."""
    lines = [np.linspace(-side / 2, side / 2, max(2, math.ceil(side / STEP) + 1)) for side in box.sides]
    out = []
    for axis in range(3):
        a, b = (lines[i] for i in range(3) if i != axis)
        u, v = (grid.ravel() for grid in np.meshgrid(a, b))
        out += [np.insert(np.stack([u, v], 1), axis, end, axis=1) for end in lines[axis][[0, -1]]]
    return box.turned(np.unique(np.concatenate(out), axis=0))


def cast(boxes, camera, camera_matrix, size):
    """Depth z (h, w) along every pixel's ray, and the index of the box it meets (-1: floor or the shell of the room)."""
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    rays = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], 1) @ np.linalg.inv(camera_matrix).T
    pose = camera.matrix()
    rays, eye = rays @ pose[:3, :3].T, pose[:3, 3]  # with z = 1 in the camera a ray's parameter is the depth
    low, high = np.array([-0.3, -0.3, 0.0]), np.array([6.3, 5.3, 4.0])
    with np.errstate(divide="ignore"):
        best = np.where(rays > 0, (high - eye) / rays, np.where(rays < 0, (low - eye) / rays, np.inf)).min(1)
    owner = np.full(len(rays), -1)
    for index, box in enumerate(boxes):
        c, s = math.cos(box.yaw), math.sin(box.yaw)
        turn, half = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), np.array(box.sides) / 2
        start, ray = turn @ (eye - box.centre), rays @ turn.T
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (-half - start) / ray, (half - start) / ray
        near, far = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
        hit = (near <= far) & (near > 0) & (near < best)
        best, owner = np.where(hit, near, best), np.where(hit, index, owner)
    return best.reshape(size[::-1]), owner.reshape(size[::-1])


def rectangle(x1, y1, x2, y2, step=0.1):
    x, y = (np.linspace(a, b, round((b - a) / step) + 1) for a, b in ((x1, x2), (y1, y2)))
    u, v = (grid.ravel() for grid in np.meshgrid(x, y))
    return np.stack([u, v, np.zeros(u.size)], 1)


def walk(count, reach, turns, start, way=1, step=20):
    """Cameras that walk once around the middle of the room at 1.5 m and turn as they go. way: 1 to the left, -1 to the right."""
    out = []
    for i in range(count):
        a = way * 2 * math.pi * i / count
        place = (3 + reach * math.cos(a), 2.5 + 0.75 * reach * math.sin(a), 1.5)
        out.append(Camera(step * i, place, start + math.pi + turns * a + 0.25 * math.sin(3 * a), 0.45 + 0.12 * math.sin(5 * a)))
    return out


def write_scene(root, name, furniture, cameras, floor, area, size=(640, 480), align=None, padded=False, nasty=True):
    """Write <root>/scans/<name>. furniture: (label, middle, sides, yaw degrees). Returns the Made scene.

    nasty: the third camera has an infinite pose, the fifth no depth picture, the seventh no pose; some segments have no
    owner; there are a wall and a label that the table lacks.
    """
    folder = root / "scans" / name
    for kind in ("color", "depth", "pose", "intrinsic"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    boxes = [Box(label, middle, sides, math.radians(yaw)) for label, middle, sides, yaw in furniture]
    turned = align is not None
    align = np.eye(4) if align is None else np.round(align, 9)
    back = np.linalg.inv(align)

    parts, groups, segment = [floor], [{"objectId": 0, "segments": [0], "label": "floor"}], 1
    wall = np.stack([np.linspace(0, 6, 61), np.zeros(61), np.full(61, 1.2)], 1)
    extra = [("wall", wall), (None, wall + [0, 0, 0.4]), (NO_ROW, rectangle(2, 2, 2.3, 2.3) + [0, 0, 0.2])] if nasty else []
    for label, points in extra:
        if label:
            groups.append({"objectId": 1000 + segment, "segments": [segment], "label": label})
        parts.append(points)
        segment += 1
    for index, box in enumerate(boxes):
        points = face_points(box)
        half = len(points) // 2
        groups.append({"objectId": 3 * index + 2, "segments": [segment + 1, segment], "label": box.label})
        box.number = 3 * index + 3
        parts += [points[:half], points[half:]]
        segment += 2
    points = np.concatenate(parts)
    world = (points @ back[:3, :3].T + back[:3, 3]).astype("<f4")
    segments = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    read = world.astype(float) @ align[:3, :3].T + align[:3, 3]
    first = 1 + len(extra)
    for index, box in enumerate(boxes):
        box.points = read[np.isin(segments, [first + 2 * index, first + 2 * index + 1])]

    fields = [(axis, "<f4") for axis in "xyz"] + [(channel, "u1") for channel in ("red", "green", "blue", "alpha")]
    vertices = np.zeros(len(world), fields)
    vertices["x"], vertices["y"], vertices["z"] = world.T
    vertices["alpha"] = 255
    PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(folder / f"{name}_vh_clean_2.ply")
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments.tolist()}))
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"sceneId": f"scannet.{name}", "segGroups": groups}))
    depth_size = (160, 120)
    color, depth_camera = intrinsics(size, 0.9 * size[0], 2.25), intrinsics(depth_size, 0.86 * depth_size[0], -0.4)
    for kind, matrix in (("color", color), ("depth", depth_camera)):
        whole = np.eye(4)
        whole[:3, :3] = matrix
        np.savetxt(folder / "intrinsic" / f"intrinsic_{kind}.txt", whole, fmt="%.9f")
    facts = {"axisAlignment": " ".join(f"{x:.9f}" for x in align.ravel()) + " "} if turned else {}
    facts["sceneType"] = "Bedroom"
    for kind, matrix, (width, height) in (("color", color, size), ("depth", depth_camera, depth_size)):
        facts |= {f"{kind}Width": width, f"{kind}Height": height, f"fx_{kind}": matrix[0, 0], f"fy_{kind}": matrix[1, 1],
                  f"mx_{kind}": matrix[0, 2], f"my_{kind}": matrix[1, 2]}  # fmt: skip
    (folder / f"{name}.txt").write_text("".join(f"{key} = {value}\n" for key, value in facts.items()))
    made = Made(name, boxes, [], size, color, depth_size, depth_camera, area, align)
    palette = np.random.default_rng(0).integers(40, 256, (len(boxes) + 1, 3)).astype(np.uint8)
    for index, camera in enumerate(cameras):
        stem = f"{camera.number:06d}" if padded else str(camera.number)
        depth, owner = cast(boxes, camera, depth_camera, depth_size)
        depth = np.round(depth * 1000).astype(np.uint16)
        depth[5:9, 20:30] = 0  # a hole, as the sensor leaves them
        Image.fromarray(palette[owner]).resize(size, Image.NEAREST).save(folder / "color" / f"{stem}.jpg", quality=60)
        pose = back @ camera.matrix()
        if nasty and index == 2:
            pose = np.full((4, 4), -np.inf)
        if not (nasty and index == 6):
            np.savetxt(folder / "pose" / f"{camera.number}.txt", pose, fmt="%.9f")
        if not (nasty and index == 4):
            Image.fromarray(depth).save(folder / "depth" / f"{camera.number}.png", compress_level=1)
        if not nasty or index not in (2, 4, 6):
            made.frames.append(camera)
            made.depth[camera.number] = depth / 1000
    return made


def shrink(folder, kind, size):
    """Save the pictures in color/ or depth/ of a scan in another size; all else stays as it is."""
    for path in (folder / kind).iterdir():
        Image.open(path).resize(size, Image.NEAREST).save(path)


def without_lines(folder, *words):
    """Drop the lines of <id>.txt with one of these words."""
    path = folder / f"{folder.name}.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not any(word in line for word in words)))


def alignment(yaw, shift):
    out = np.eye(4)
    out[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    out[:3, 3] = shift
    return out


BEDROOM = [
    ("table", (3.05, 2.4, 0.37), (1.23, 0.71, 0.74), 17),
    ("chair", (3.95, 2.95, 0.41), (0.45, 0.47, 0.82), 40),
    ("chair", (2.1, 2.25, 0.41), (0.45, 0.47, 0.82), -65),
    ("office chair", (3.2, 3.45, 0.5), (0.53, 0.55, 1.0), 10),
    ("bed", (0.95, 4.05, 0.25), (1.61, 1.5, 0.5), -8),
    ("sofa", (4.9, 0.75, 0.38), (1.82, 0.87, 0.76), 4),
    ("lamp", (5.6, 4.6, 0.83), (0.31, 0.29, 1.66), 33),
    ("trash can", (1.2, 0.5, 0.23), (0.36, 0.33, 0.46), 21),
    ("monitor", (2.9, 2.45, 0.95), (0.57, 0.12, 0.4), 28),
    ("cabinet", (2.2, 0.4, 0.6), (1.13, 0.58, 1.2), -3),
    ("safe", (2.2, 0.4, 0.6), (0.4, 0.24, 0.4), 0),  # inside the cabinet
    ("vent", (3.0, 2.5, 3.4), (0.5, 0.4, 0.2), 12),  # above every picture
    ("backpack", (5.55, 2.2, 0.27), (0.43, 0.28, 0.54), 74),
    ("plant", (5.7, 1.5, 0.25), (0.3, 0.32, 0.5), 15),
    ("plant", (0.35, 2.7, 0.25), (0.3, 0.32, 0.5), 50),
    ("plant", (3.8, 2.5, 3.4), (0.3, 0.32, 0.5), 50),  # above every picture: not all plants are shown
]
STUDY = [
    ("<script>alert(1)</script>", (1.1, 3.8, 0.4), (0.83, 0.64, 0.8), 25),
    ('a"b&c', (2.9, 4.3, 0.5), (0.66, 0.41, 1.0), -15),
    ("chair", (2.6, 2.3, 0.41), (0.44, 0.48, 0.82), 50),
    ("office chair", (1.4, 1.9, 0.52), (0.54, 0.52, 1.04), 5),
    ("table", (4.4, 1.0, 0.36), (1.42, 0.77, 0.72), -12),
    ("stool", (2.35, 0.6, 0.22), (0.33, 0.36, 0.44), 30),
    ("stool", (0.5, 0.6, 0.22), (0.33, 0.36, 0.44), 70),
    ("plant", (3.4, 2.75, 0.56), (0.38, 0.42, 1.12), 12),
    ("bed", (5.0, 2.15, 0.27), (1.5, 1.1, 0.54), 88),
]


def bedroom(root, name="scene0007_00", frames=42):
    """A rectangular room of 30 m2; its world is turned by 37 degrees and moved."""
    align = alignment(0.65, (1.3, -2.2, 0.4))
    made = write_scene(root, name, BEDROOM, walk(frames, 2.3, 1, 0.1), rectangle(0, 0, 6, 5), 30.0, align=align)
    made.hidden = ["safe", "vent"]
    return made


def study(root, name="scene0012_01", frames=24, nasty=True):
    """An L of 26 m2 without an alignment; its pictures are small and their names padded."""
    floor = np.concatenate([rectangle(0, 0, 6, 3), rectangle(0, 3, 4, 5)])
    return write_scene(root, name, STUDY, walk(frames, 1.4, 1.2, 0.9, -1), floor, 26.0, (324, 242), padded=True, nasty=nasty)


def write_table(root, without=()):
    """The label table, with more columns than are read."""
    rows = [f"{i}\t{raw}\t{raw}\t7\t{nyu}\tname {nyu}" for i, (raw, nyu) in enumerate(TABLE.items()) if raw not in without]
    path = root / "scannetv2-labels.combined.tsv"
    path.write_text("id\traw_category\tcategory\tcount\tnyu40id\tnyu40class\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path
