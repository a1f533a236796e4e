"""Runs a monocular depth model of transformers from a local folder.

Any model that `AutoModelForDepthEstimation` loads: Depth Anything, DPT, ZoeDepth, Depth Pro. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gasp_fast.data.errors import one_line


class DepthModel:
    """`DepthModel(folder)(image)` predicts depth or inverse depth, in a unit of the model's own."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json; --model is the local folder of a transformers depth model")
        if not (folder / "preprocessor_config.json").is_file():
            raise ValueError(f"{folder}: no preprocessor_config.json; save the model's image processor there too")
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # on damaged folders the libraries raise anything
            raise OSError(f"{folder}: cannot load the depth model: {one_line(error)}") from error
        try:
            torch.zeros(1, device=device).cpu()
            self.model = model.to(device).eval()
        except Exception as error:  # of many types, by device
            raise ValueError(f"device = {device!r} cannot be used here: {one_line(error)}") from error
        self.device = device

    def __call__(self, image: np.ndarray) -> np.ndarray:  # float32 [H, W]
        import torch

        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            predicted = self.model(**inputs).predicted_depth[None].float()  # [1, 1, h, w]
            resized = torch.nn.functional.interpolate(predicted, image.shape[:2], mode="bilinear", align_corners=False)
        return resized[0, 0].cpu().numpy()
