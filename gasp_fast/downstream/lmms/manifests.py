"""The models that gasp_fast adds to lmms-eval.

The entry point `lmms_eval.models` of this package names `MANIFESTS`: where gasp-fast is installed beside lmms-eval, the
models are there for lmms-eval's own command too. `run.py` registers them without that.
"""

from lmms_eval.models.registry_v2 import ModelManifest

_FOLDER = f"{__package__}." if __package__ else ""  # empty where `run.py` imports this as a file beside it
MANIFESTS = [ModelManifest("llava_next_video", chat_class_path=f"{_FOLDER}llava_next_video.LlavaNextVideo")]
