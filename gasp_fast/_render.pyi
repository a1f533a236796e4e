import numpy as np
from numpy.typing import NDArray

def render(
    room: NDArray[np.float64],
    lamp: NDArray[np.float64],
    boxes: NDArray[np.float64],
    surface_texture: NDArray[np.int32],
    surface_colour: NDArray[np.float64],
    texels: NDArray[np.float32],
    texture_count: int,
    texture_size: int,
    texture_metres: float,
    camera_to_world: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    width: int,
    height: int,
    samples: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]: ...
