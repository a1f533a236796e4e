from support.tiny_training import assets  # noqa: F401 (fixture)
