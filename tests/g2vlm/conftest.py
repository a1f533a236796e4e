import json

import pytest
from support.tiny_training import assets  # noqa: F401 (fixture)

from gasp_fast.data.questions.scene_frames import SceneFrames
from gasp_fast.data.questions.video_qa import record_json
from gasp_fast.data.scenes.library import scene_digest
from gasp_fast.data.scenes.open import open_scene


@pytest.fixture(scope="session")
def questions(
    assets,  # noqa: F811
    tmp_path_factory,
):
    """Records about two or three frames of the rendered rooms."""
    folder, records = tmp_path_factory.mktemp("records"), []
    for number in range(8):
        scene = open_scene(assets.scenes / f"scene-{number % 4}")
        frames = SceneFrames(f"scene-{number % 4}", scene_digest(scene), (1, 4, 6)[: 2 + number % 2], (0, 0, 96, 80))
        texts = ["<image>\nHow many boxes?" + " Count well." * number, f"There are {number}."]
        records.append(record_json(str(number), texts, "test", frames))
    (folder / "records.json").write_text(json.dumps(records))
    return folder
