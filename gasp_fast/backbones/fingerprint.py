"""The fingerprint of a base model: tells whether adapters meet the model that they were trained on.

It is a hash of each of three parts of a model's folder:

    config       config.json, without the name of the folder and the version of transformers
    processor    the files of the processor and the tokenizer
    weights      name, type and shape of every tensor, and 192 bytes of each: from its beginning, middle and end

A copy of the folder, or one whose weights are divided into other files, has the same fingerprint. Fine-tuned weights
have another one, because training changes nearly every number. A change that leaves those bytes of every tensor as they
are is not seen. Reading takes a fraction of a second for a 7B model, while a hash of all its weights would take minutes
on a network file system.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gasp_fast.files import LARGEST_JSON, parse_json, read_json
from gasp_fast.run_folder import ABOUT

from .saved_model import loading, local_folder

_VOLATILE = ("_name_or_path", "transformers_version")  # keys of config.json that do not change the model
_PROCESSOR = (
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"
_SAMPLE = 64  # bytes


def fingerprint(source: str) -> dict[str, str] | None:
    """Hashes of the parts of the model `source`; None if it is a hub model that is not on this machine yet."""
    try:
        folder = Path(local_folder(source))
    except OSError:
        return None
    with loading(source):
        config = {name: value for name, value in read_json(folder / "config.json").items() if name not in _VOLATILE}
        processor = ((folder / name).read_bytes() if (folder / name).is_file() else b"" for name in _PROCESSOR)
        return {
            "config": _hash([json.dumps(config, sort_keys=True).encode()]),
            "processor": _hash(processor),
            "weights": _hash(sample for _, sample in sorted(_samples(folder))),
        }


def check_base(checkpoint: Path, base: str) -> None:
    """Raise if the adapters of a checkpoint were trained on other weights than those of the model `base`."""
    path = checkpoint / ABOUT
    about = read_json(path) if path.is_file() else None
    trained_on = about.get("base") if isinstance(about, dict) else None
    expected = trained_on.get("weights") if isinstance(trained_on, dict) else None
    if expected is None:  # of an earlier version, or by another trainer
        return
    found = fingerprint(base)
    if found is not None and found["weights"] != expected:
        raise ValueError(
            f"{checkpoint} was trained on other weights than {base!r} holds; name the right base model with --base"
        )


def _hash(parts: Iterable[bytes]) -> str:
    """Of byte strings, with their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _samples(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, description and some bytes) of every tensor."""
    if (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        with open(folder / name, "rb", buffering=0) as file:
            opened = file.fileno()
            data = 8 + int.from_bytes(os.pread(opened, 8, 0), "little")  # where the header ends and the numbers begin
            header = parse_json(os.pread(opened, min(data - 8, LARGEST_JSON), 8), str(folder / name))
            header.pop("__metadata__", None)
            for tensor, facts in header.items():
                begin, end = (data + offset for offset in facts["data_offsets"])
                count = min(_SAMPLE, end - begin)
                places = (begin, (begin + end - count) // 2, end - count)
                described = json.dumps([tensor, facts["dtype"], facts["shape"]]).encode()
                yield tensor, described + b"".join(os.pread(opened, count, place) for place in places)
