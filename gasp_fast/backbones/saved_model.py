"""Loads saved transformers models: complete ones only, with one-line errors, and without a download unless named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gasp_fast.files import one_line


def load_complete(kind: Any, source: str | os.PathLike[str], unused: bool = True, **options: Any) -> Any:
    """Load a transformers model whose files hold every weight. transformers alone fills missing ones with noise.

    `kind` is the class with `from_pretrained`. With `unused`, the files may hold weights that the model has not.
    """
    source = os.fspath(source)
    with loading(source):
        model, report = kind.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=Path(source).is_dir(),  # whatever other models its files name
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **options,
        )
    for problem in ("missing_keys", "mismatched_keys", *([] if unused else ["unexpected_keys"])):
        if report[problem]:
            names = sorted(key if isinstance(key, str) else key[0] for key in report[problem])
            raise ValueError(
                f"model = {source!r} has {len(names)} {problem.replace('_', ' ')}, such as {names[0]}: its weights are "
                "not those of its config.json; get the folder again"
            )
    return model


@contextmanager
def loading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever the libraries raise on a model's damaged files into a one-line `OSError` that names the model."""
    try:
        yield
    except ImportError:  # of a package that is not installed
        raise
    except Exception as error:
        raise OSError(f"model = {os.fspath(source)!r} cannot be loaded: {one_line(error)}") from error


def local_folder(source: str, option: str = "--base") -> str:
    """The folder of a model that the files of a run name: a folder, or a model in the hub's cache. Never downloads.

    `option` is the one that names another model.
    """
    if Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError) as error:
        raise OSError(
            f"the base model {source!r} of the run is neither a folder here nor a hub model in the cache; name it with "
            f"{option} (a hub name given there is downloaded)"
        ) from error
