from support.workshop import *  # noqa: F403 (fixtures)
