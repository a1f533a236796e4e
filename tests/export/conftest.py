from support.connections import *  # noqa: F403 (fixtures)
from support.families import *  # noqa: F403 (fixtures)
