"""Grey textures for the synthetic scenes.

All textures have the same mean and contrast, so that brightness alone does not reveal the position of a patch. Each is
periodic: a pattern whose parts have random shades, so that no two places look the same, plus 1/f noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.float32]

SIZE = 512  # texels on a side, a power of two
MEAN, CONTRAST = 0.5, 0.15


def _noise(rng: np.random.Generator, slope: float = 1.1) -> Grey:
    """Periodic noise with amplitude 1 / frequency^slope, mean 0 and deviation 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(spectrum * np.maximum(frequency, 3 / SIZE) ** -slope, s=(SIZE, SIZE)).astype(np.float32)
    return (field - field.mean()) / field.std()


def _cells(rng: np.random.Generator, rows: int, columns: int, stagger: float, joint: float) -> Grey:
    """Rectangles of random shade in rows, each row shifted by `stagger` cells, with dark joints."""
    y, x = (np.arange(SIZE) + 0.5) / SIZE * rows, (np.arange(SIZE) + 0.5) / SIZE * columns
    row = y.astype(int)
    shifted = (x[None] + stagger * row[:, None]) % columns  # [S, S]
    shade = rng.uniform(-1.5, 1.5, (rows, columns)).astype(np.float32)
    field: Grey = shade[row[:, None], shifted.astype(int)]
    gap_x, gap_y = shifted % 1 / columns, (y % 1 / rows)[:, None]
    field[(gap_x < joint) | (gap_y < joint)] = -2.2
    return field


def _blotches(rng: np.random.Generator) -> Grey:
    broad, fine = (np.tanh(4 * _noise(rng, slope)) for slope in (1.6, 1.3))
    return (broad + 0.6 * fine).astype(np.float32)


def _spots(rng: np.random.Generator) -> Grey:
    """Discs of random shade and size on a plain background."""
    field = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(90):
        x, y, radius = (int(n) for n in rng.integers([0, 0, 8], [SIZE, SIZE, 27]))
        reach = np.arange(-radius, radius + 1)
        disc = reach[:, None] ** 2 + reach[None] ** 2 < radius**2
        window = np.ix_((y + reach) % SIZE, (x + reach) % SIZE)
        field[window] = np.where(disc, np.float32(rng.uniform(-2, 2)), field[window])
    return field


PATTERNS: dict[str, Callable[[np.random.Generator], Grey]] = {
    "bricks": partial(_cells, rows=16, columns=8, stagger=0.5, joint=0.008),
    "tiles": partial(_cells, rows=8, columns=8, stagger=0.0, joint=0.006),
    "planks": partial(_cells, rows=16, columns=2, stagger=0.77, joint=0.005),
    "mosaic": partial(_cells, rows=24, columns=24, stagger=0.0, joint=0.004),
    "blotches": _blotches,
    "spots": _spots,
}


def make_texture(rng: np.random.Generator, pattern: str) -> Grey:
    """One texture `[SIZE, SIZE]` in 0..1 with the common mean and contrast."""
    field = PATTERNS[pattern](rng) + 0.7 * _noise(rng)
    return np.clip(MEAN + CONTRAST * (field - field.mean()) / field.std(), 0.04, 0.96, dtype=np.float32)


def mip_levels(textures: Grey) -> Grey:
    """The mip levels of `[n, S, S]` textures, down to one texel, flattened one after the other."""
    levels = [textures]
    while (side := levels[-1].shape[1]) > 1:
        levels.append(levels[-1].reshape(-1, side // 2, 2, side // 2, 2).mean(axis=(2, 4), dtype=np.float32))
    return np.concatenate([level.ravel() for level in levels])
