"""Scenes as 64x64 pictures: flat background, one filled shape, an optional texture and an optional outline.

Everything is drawn four times too large and averaged down, which gives smooth edges. Small random changes of place,
size, angle and colour make two drawings of the same scene differ.
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from rlr_peft.tiny_shapes import IMAGE_SIZE, Scene

Points = npt.NDArray[np.float64]

_SUPERSAMPLING = 4

_BACKGROUND_RGB = {
    "gray": (128, 128, 128),
    "sky": (140, 195, 230),
    "sand": (222, 200, 150),
    "navy": (25, 32, 95),
    "forest": (20, 80, 50),
    "brown": (100, 62, 40),
}
_COLOR_RGB = {
    "red": (220, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 230, 50),
    "green": (75, 200, 70),
    "blue": (50, 100, 240),
    "purple": (145, 55, 200),
    "pink": (250, 140, 200),
}
_OUTLINE_RGB = {"black": (0, 0, 0), "white": (255, 255, 255)}
_CENTERS = {
    "center": (32.0, 32.0),
    "top left": (20.0, 20.0),
    "top right": (44.0, 20.0),
    "bottom left": (20.0, 44.0),
    "bottom right": (44.0, 44.0),
}
_RADII = {"small": 13.0, "large": 18.5}

# The shade of a texture's second colour relative to its first, and lengths in pixels of the 64-pixel image. The
# lengths are those that survive an autoencoder which keeps one latent per 4x4 pixels.
_TEXTURE_SHADE = 0.35
_STRIPE_PERIOD = 8.0
_DOT_SPACING = 8.0
_DOT_RADIUS = 2.5
_CHECK_SIDE = 6.0
_OUTLINE_WIDTH = 3.0

_JITTER_PLACE = 1.0
_JITTER_RADIUS = 0.05
_JITTER_ANGLE = 8.0
_JITTER_RGB = 8.0


def draw(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: What to draw.
        rng: Source of the small variations; the same state gives the same picture.

    Returns:
        The picture, (64, 64, 3), RGB in 0..255.
    """
    center = np.array(_CENTERS[scene.position]) + rng.uniform(-_JITTER_PLACE, _JITTER_PLACE, 2)
    radius = _RADII[scene.size] * (1 + rng.uniform(-_JITTER_RADIUS, _JITTER_RADIUS))
    angle = math.radians(rng.uniform(-_JITTER_ANGLE, _JITTER_ANGLE))
    background = _jitter_rgb(_BACKGROUND_RGB[scene.background], rng)
    color = _jitter_rgb(_COLOR_RGB[scene.color], rng)

    side = IMAGE_SIZE * _SUPERSAMPLING
    contours = [_place(contour, center, radius, angle) for contour in _contours(scene.shape)]
    fill = np.asarray(_fill(contours, side), dtype=bool)
    canvas = np.empty((side, side, 3), dtype=np.float32)
    canvas[:] = background
    second = _texture(scene.texture, center, angle, side)
    canvas[fill & ~second] = color
    canvas[fill & second] = color * _TEXTURE_SHADE
    if scene.outline != "none":
        canvas[np.asarray(_stroke(contours, side), dtype=bool)] = _OUTLINE_RGB[scene.outline]
    small = canvas.reshape(IMAGE_SIZE, _SUPERSAMPLING, IMAGE_SIZE, _SUPERSAMPLING, 3).mean((1, 3))
    picture: npt.NDArray[np.uint8] = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    return picture


def _jitter_rgb(rgb: tuple[int, int, int], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return np.clip(np.array(rgb) + rng.uniform(-_JITTER_RGB, _JITTER_RGB, 3), 0, 255).astype(np.float32)


def _place(contour: Points, center: Points, radius: float, angle: float) -> list[tuple[float, float]]:
    """Turn, scale and move a contour, from units of the radius to pixels of the large canvas."""
    cosine, sine = math.cos(angle), math.sin(angle)
    turned = contour @ np.array([[cosine, sine], [-sine, cosine]])
    return [tuple(point) for point in (turned * radius + center) * _SUPERSAMPLING]


def _fill(contours: list[list[tuple[float, float]]], side: int) -> Image.Image:
    """The first contour filled, the others cut out of it."""
    mask = Image.new("1", (side, side))
    pen = ImageDraw.Draw(mask)
    for number, contour in enumerate(contours):
        pen.polygon(contour, fill=0 if number else 1)
    return mask


def _stroke(contours: list[list[tuple[float, float]]], side: int) -> Image.Image:
    mask = Image.new("1", (side, side))
    pen = ImageDraw.Draw(mask)
    for contour in contours:
        pen.line([*contour, *contour[:2]], fill=1, width=round(_OUTLINE_WIDTH * _SUPERSAMPLING), joint="curve")
    return mask


def _texture(texture: str, center: Points, angle: float, side: int) -> npt.NDArray[np.bool_]:
    """Where the second colour goes, (side, side); the pattern is fixed to the shape's centre and angle."""
    if texture == "plain":
        return np.zeros((side, side), dtype=bool)
    pixels = (np.arange(side) + 0.5) / _SUPERSAMPLING
    offset_x, offset_y = pixels[None, :] - center[0], pixels[:, None] - center[1]
    cosine, sine = math.cos(angle), math.sin(angle)
    along, across = cosine * offset_x + sine * offset_y, cosine * offset_y - sine * offset_x
    second: npt.NDArray[np.bool_]
    if texture == "striped":
        second = np.floor(across / (_STRIPE_PERIOD / 2) + 0.5) % 2 == 1
    elif texture == "checkered":
        second = (np.floor(along / _CHECK_SIDE) + np.floor(across / _CHECK_SIDE)) % 2 == 1
    elif texture == "dotted":
        nearest_x = along - _DOT_SPACING * np.rint(along / _DOT_SPACING)
        nearest_y = across - _DOT_SPACING * np.rint(across / _DOT_SPACING)
        second = nearest_x**2 + nearest_y**2 < _DOT_RADIUS**2
    else:
        raise ValueError(f"unknown texture {texture!r}")
    return second


def _contours(shape: str) -> list[Points]:
    """Outer contour and holes of a shape, in units of its radius, y pointing down."""
    if shape == "circle":
        return [_arc(1.0, 0, 360)]
    if shape == "ring":
        return [_arc(1.08, 0, 360), _arc(0.42, 0, 360)]
    if shape == "square":
        return [0.88 * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])]
    if shape == "triangle":
        return [1.18 * _arc(1.0, -90, 150, count=3) + np.array([0.0, 0.2])]
    if shape == "star":
        tips = 1.14 * _arc(1.0, -90, 198, count=5)
        notches = 0.55 * _arc(1.0, -54, 234, count=5)
        return [np.stack([tips, notches], axis=1).reshape(-1, 2)]
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return [np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15.5]
    if shape == "moon":
        # A disc less a smaller disc that lies to its right; the arcs meet where the two circles cross.
        cut_center, cut_radius = 0.6, 0.82
        crossing = (1 + cut_center**2 - cut_radius**2) / (2 * cut_center)
        outer = math.degrees(math.acos(crossing))
        inner = math.degrees(math.atan2(math.sqrt(1 - crossing**2), crossing - cut_center))
        bite = _arc(cut_radius, 360 - inner, inner) + np.array([cut_center, 0.0])
        return [1.1 * (np.concatenate([_arc(1.0, outer, 360 - outer), bite]) + np.array([0.15, 0.0]))]
    if shape == "cross":
        long, short = 1.08, 0.4
        corner = np.array([(short, -long), (short, -short), (long, -short)])
        quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])
        return [np.concatenate([corner @ np.linalg.matrix_power(quarter, turn) for turn in range(4)])]
    raise ValueError(f"unknown shape {shape!r}")


def _arc(radius: float, start: float, end: float, count: int = 40) -> Points:
    """Points on a circle around the origin from one angle to another, in degrees."""
    angles = np.radians(np.linspace(start, end, count))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
