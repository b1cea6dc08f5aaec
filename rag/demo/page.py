"""The page of the demo, which brings its style and script along.

server.page = render([model.description() for model in models], server.nonce)
"""

from pathlib import Path
from typing import Any

from rag.demo.questions import MOST_CHARACTERS
from rag.pages.templates import environment, script_json

TEMPLATE = "page.html"
# How a setting is called on the page.
LABELS = {"n_docs": "passages", "num_beams": "beams", "ef_search": "efSearch", "nprobe": "nprobe"}


def render(models: list[dict[str, Any]], nonce: str) -> bytes:
    """HTML in UTF-8.

    Args:
        models: their descriptions (`DemoModel.description`).
        nonce: that the server's policy names.
    """
    settings: dict[str, dict[str, int]] = {}
    for model in models:
        for name, setting in model["settings"].items():
            known = settings.setdefault(name, dict(setting))
            known["most"] = min(known["most"], setting["most"])  # one field sets it in all of them
    content = {
        "nonce": nonce,
        "models": models,
        "settings": settings,
        "labels": LABELS,
        "most_characters": MOST_CHARACTERS,
        "data": script_json(models),
    }
    return environment(Path(__file__).parent).get_template(TEMPLATE).render(content).encode(errors="replace")
