"""Templates to HTML pages, with a look in common.

    page = environment(Path(__file__).parent).get_template("page.html").render(content)

A template takes the look by `{% include "common.css" %}` in its style and `{% include "common.js" %}` in its script.
"""

import json
from pathlib import Path
from typing import Any


def environment(folder: Path) -> Any:
    """Jinja's environment of the templates in `folder` and of those in common; what they are given is text, no HTML."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def script_json(content: Any) -> str:
    """JSON that ends no `<script>` element, whatever texts it holds."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
