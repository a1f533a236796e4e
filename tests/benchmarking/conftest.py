from support.tiny_training import *  # noqa: F403 (fixtures)
