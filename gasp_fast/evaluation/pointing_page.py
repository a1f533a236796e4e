"""Reads the `pointing.json` of reports, and joins those of several models into the data of one page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gasp_fast.files import one_line, read_json

from .pointing import LARGEST, NOWHERE, VERSION, evenly
from .report_check import check, is_count, is_number
from .tables import KIND_NAMES, Report, radius_of

FILE = "pointing.json"
LARGEST_FILE = 1 << 26  # bytes; we write at most some 3 MB
LARGEST_PAGE = 2 * LARGEST * 4 // 3  # characters of base64 of all models


def read_pointing(folder: Path) -> dict[str, Any] | None:
    """The file in a report's folder; None if there is none, as in reports of earlier versions."""
    path = folder / FILE
    if not path.is_file():
        return None
    content = read_json(path, LARGEST_FILE)
    try:
        check(content["version"] == VERSION, "version")
        check(is_number(content["temperature"]) and content["temperature"] > 0, "temperature")
        for sequence in content["sequences"]:
            _check_sequence(sequence)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)}); run gasp-fast evaluate again, or delete it") from error
    return dict(content)


def page_data(reports: Mapping[str, Report], pointings: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The data of the page, None if there is none, and a note on what it lacks, in words.

    `pointings` are the contents of `pointing.json` of those reports that have one.
    """
    missing = [name for name in reports if name not in pointings]
    cure = "run gasp-fast evaluate on them again" if len(reports) > 1 else "run gasp-fast evaluate again"
    note = f"Without features to point at: {', '.join(missing)}; {cure}." if missing else ""
    if not pointings:
        return None, note
    sequences = _shared_sequences(list(pointings.values()))
    layers = _shared_layers(sequences)
    if not layers:
        return None, "The reports share no sequences, features and layers to point at."
    _keep_layers(sequences, layers)
    last = reports[list(pointings)[-1]]
    kind = last["features"] if last["features"] in layers else next(iter(layers))
    best = last["by_features"][kind]["pck"]["peak_layer"] if kind in last["by_features"] else layers[kind][-1]
    return {
        "models": [{"name": name, "temperature": one["temperature"]} for name, one in pointings.items()],
        "kinds": {kind: {"name": KIND_NAMES[kind], "layers": numbers} for kind, numbers in layers.items()},
        "kind": kind,
        "layer": min(layers[kind], key=lambda layer: abs(layer - best)),
        "radius": radius_of(last),
        "agreement": _agreement(sequences),
        "sequences": sequences,
    }, note


def _shared_sequences(pointings: Sequence[Any]) -> list[dict[str, Any]]:
    """Those that all models have: frames once, and `models` with what each model has of its own."""
    shared = []
    for one in pointings[0]["sequences"]:
        same = [
            next((other for other in content["sequences"] if _identity(other) == _identity(one)), None)
            for content in pointings
        ]
        if None not in same:
            of_model = ("grids", "truth", "matches", "features")
            models = [{name: other[name] for name in of_model} for other in same if other is not None]
            shared.append({name: value for name, value in one.items() if name not in of_model} | {"models": models})
    return shared


def _identity(sequence: Mapping[str, Any]) -> tuple[Any, ...]:
    return sequence["scene"], tuple(sequence["frames"])


def _shared_layers(sequences: Sequence[Any]) -> dict[str, list[int]]:
    """For each kind the layers that all models have in all sequences, in order; as many as fit into a page."""
    features = [model["features"] for sequence in sequences for model in sequence["models"]]
    layers = {
        kind: sorted(set.intersection(*(set(map(int, one.get(kind, {}))) for one in features)))
        for kind in KIND_NAMES
        if features
    }
    layers = {kind: numbers for kind, numbers in layers.items() if numbers}
    for most in range(max(map(len, layers.values()), default=0), 0, -1):
        chosen = {kind: evenly(numbers, most) for kind, numbers in layers.items()}
        stored = [one[kind][str(layer)] for one in features for kind in chosen for layer in chosen[kind]]
        if sum(len(one[name]) for one in stored for name in ("queries", "keys", "best")) <= LARGEST_PAGE:
            return chosen
    return {}


def _keep_layers(sequences: Sequence[Any], layers: Mapping[str, Sequence[int]]) -> None:
    for sequence in sequences:
        for model in sequence["models"]:
            features = model["features"]
            model["features"] = {kind: {n: features[kind][str(n)] for n in layers[kind]} for kind in layers}


def _agreement(sequences: Sequence[Any]) -> float:
    """Mean over everything that the page can show."""
    return float(
        np.mean(
            [
                one["agreement"]
                for sequence in sequences
                for model in sequence["models"]
                for of_kind in model["features"].values()
                for one in of_kind.values()
            ]
        )
    )


# ---- checks of a file that is not trusted ---------------------------------------------------------------------------


def _check_sequence(sequence: Any) -> None:
    frames, grids = sequence["frames"], sequence["grids"]
    check(isinstance(sequence["scene"], str), "scene")
    check(len(frames) > 1 and all(map(is_count, frames)), "frames")
    check(len(sequence["size"]) == 2 and all(is_count(side) and side > 0 for side in sequence["size"]), "size")
    check(len(sequence["images"]) == len(grids) == len(frames), "images")
    for image in sequence["images"]:
        _bytes(image, "images")
    for columns, rows, *rectangle in grids:
        check(is_count(columns) and is_count(rows) and 0 < columns * rows < NOWHERE, "grids")
        check(len(rectangle) == 4 and all(map(is_number, rectangle)), "grids")
        left, top, right, bottom = rectangle
        check(left < right and top < bottom, "grids")
    tokens = [columns * rows for columns, rows, *_ in grids]
    later = tokens[1:]
    truth = np.frombuffer(_bytes(sequence["truth"], "truth", 2 * tokens[0] * len(later)), "<u2")
    check(bool(((truth.reshape(-1, len(later)) < later) | (truth.reshape(-1, len(later)) == NOWHERE)).all()), "truth")
    matches = np.frombuffer(_bytes(sequence["matches"], "matches"), "<u2").reshape(-1, 3)  # or a ValueError
    anchor, frame, target = matches.T
    check(bool(((anchor < tokens[0]) & (frame < len(later))).all()), "matches")
    check(bool((target < np.array(later)[frame]).all()), "matches")
    for kind, layers in sequence["features"].items():
        check(kind in KIND_NAMES, "features")
        for number, one in layers.items():
            check(number.isdecimal() and len(number) < 6 and number == str(int(number)), "features")
            _check_layer(one, tokens[0], later)


def _check_layer(one: Any, queries: int, later: Sequence[int]) -> None:
    components = len(one["scale"])
    check(0 < components <= 256 and all(map(is_number, one["scale"])), "scale")
    _bytes(one["queries"], "queries", queries * components)
    _bytes(one["keys"], "keys", sum(later) * components)
    best = np.frombuffer(_bytes(one["best"], "best", 2 * queries * len(later)), "<u2").reshape(queries, -1)
    check(bool((best < later).all()), "best")
    check(is_number(one["agreement"]) and 0 <= one["agreement"] <= 1, "agreement")


def _bytes(text: Any, name: str, length: int | None = None) -> bytes:
    """The bytes of base64; `length` of them, where it is given."""
    check(isinstance(text, str), name)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is damaged") from error
    check(length is None or len(data) == length, name)
    return data
