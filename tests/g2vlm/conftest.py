from support.g2vlm_training import *  # noqa: F403 (fixtures)
from support.tiny_training import assets, questions  # noqa: F401 (fixtures)
