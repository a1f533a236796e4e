"""A depth model of transformers is a function from image to map."""

from __future__ import annotations

import numpy as np


def test_the_model_is_a_function_from_image_to_map(tiny_depth_model, scene_boxes):
    from gasp_fast.data.depth.monocular import DepthModel

    model = DepthModel(tiny_depth_model)
    first = model(scene_boxes.image(0))
    assert first.shape == (216, 360) and np.isfinite(first).all() and first.std() > 0
    assert np.array_equal(first, model(scene_boxes.image(0)))
