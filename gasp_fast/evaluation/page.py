"""One self-contained HTML page from the templates: styles, pictures, data and script are inside, nothing is loaded.

A Content-Security-Policy forbids all network access and every script but ours. Texts from data are escaped here or
where the parts are made; the data of the script is JSON that cannot end its element.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from gasp_fast.files import write_atomically

Link = tuple[str, Path]  # words, and the file that they lead to
SCRIPTS = ("pointing.js", "cloud.js")
_TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """`parts` are HTML."""
    digests = [base64.b64encode(hashlib.sha256(_template(name).encode()).digest()).decode() for name in SCRIPTS]
    page = _filled(
        "page.html",
        title=html.escape(title),
        script_source=" ".join(f"'sha256-{digest}'" for digest in digests),
        style=_template("page.css"),
        body="\n".join(part for part in parts if part),
    )
    write_atomically(path, page.encode())
    return path


def pointing_part(data: Mapping[str, Any]) -> str:
    """The part in which a reader points at tokens; `data` is from `page_data`."""
    return _filled(
        "pointing.html",
        data=_json_in_script(data),
        script=_template("pointing.js"),
        radius=f"{data['radius']:g}",
        agreement=f"{data['agreement']:.1%}",
    )


def cloud_part(caption: str, data: Mapping[str, Any]) -> str:
    """A point cloud that turns, and that a reader turns; one to a page.

    `data`: "points", base64 of uint16 [n, 3], of which 0 and 65535 are -1 and 1 (x right, y down, z away from the first
    view); "colours", base64 of uint8 [n, 3]; "lines", numbers [m, 2, 3] in the same unit.
    """
    return _filled("cloud.html", data=_json_in_script(data), script=_template("cloud.js"), caption=html.escape(caption))


def plot(caption: str, svg: str, narrow: bool = False) -> str:
    style = "plot narrow" if narrow else "plot"
    return f'<figure class="{style}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def folded(summary: str, part: str) -> str:
    """A part that a reader opens."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{part}\n</details>"


def picture(caption: str, path: Path) -> str:
    """A picture of photographs inside the page, as a JPEG: the file as PNG would be several times larger."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'


def links(targets: Sequence[Link], folder: Path) -> str:
    """Relative links from a page in `folder` to those files that exist."""
    items = [
        f'<li><a href="{html.escape(quote(relative))}">{html.escape(words)}</a></li>'
        for words, path in targets
        if path.is_file() and (relative := os.path.relpath(path.resolve(), folder.resolve()))
    ]
    return f'<ul class="links">{"".join(items)}</ul>' if items else ""


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _filled(name: str, **values: str) -> str:
    """A template with its `{{names}}` replaced, in one pass: what is put in is not searched."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _template(name))


def _json_in_script(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
