"""The checksum of a shard depends on everything in it."""

from __future__ import annotations

import numpy as np

from gasp_fast.data.annotations.shard import checksum


def test_a_checksum_depends_on_names_types_and_shapes() -> None:
    base = {"a": np.arange(6, dtype=np.int32)}
    variants = [
        base,
        {"b": base["a"]},
        {"a": base["a"].reshape(2, 3)},
        {"a": base["a"].view(np.uint32)},
        {"a": base["a"][::-1]},
    ]
    assert len({checksum(arrays) for arrays in variants}) == len(variants)
