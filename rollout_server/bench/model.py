"""What is benchmarked: a model from a folder, or one with random weights."""

import os
from collections.abc import Callable
from typing import Any

import torch

# Sizes in the order of FIELDS; whether the embeddings are tied.
SHAPES = {
    "tiny": (2, 128, 256, 4, 2, 512, False),
    "smollm2": (30, 576, 1536, 9, 3, 49152, True),
    "1b": (16, 2048, 8192, 32, 8, 128256, True),
    "7b": (32, 4096, 14336, 32, 8, 32000, False),
}
FIELDS = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab")


def add_options(parser: Any) -> None:
    """Options that say which model."""
    parser.add_argument("--model", metavar="FOLDER", help="a model of transformers")
    parser.add_argument(
        "--preset", choices=SHAPES, default="smollm2", help="shape of a random model (%(default)s)"
    )
    for name in FIELDS:
        text = f"instead of the preset's {name.replace('_', ' ')}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.add_argument(
        "--architecture", choices=("llama", "qwen3"), default="llama", help="of a random model"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))


def load(given: Any, device: str) -> tuple[str, Any, Any]:
    """(name, model, tokenizer) by the options; the dtype is the device's usual one if not given."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, given.dtype or ("float32" if device == "cpu" else "bfloat16"))
    own = {name: value for name in FIELDS if (value := getattr(given, name)) is not None}
    model: Any
    if not given.model:
        model = random_model(given.preset, own, dtype, device, given.architecture)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        usual = not own and given.architecture == "llama"
        name = given.preset if usual else f"{given.architecture}-{millions:.0f}m"
        return name, model, tokenizer()
    if own:
        raise SystemExit(f"--model and --{next(iter(own))} exclude each other")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
    name = os.path.basename(os.path.normpath(given.model))
    return name, model.to(device), AutoTokenizer.from_pretrained(given.model)


def random_model(
    preset: str,
    own: dict[str, int],
    dtype: torch.dtype,
    device: str,
    architecture: str = "llama",
    spread: float = 0.02,
) -> Any:
    """A model of `preset`'s sizes, or of those in `own`; architecture: transformers' name of one
    that has such sizes; spread: standard deviation of weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    *sizes, tied = SHAPES[preset]
    shape = dict(zip(FIELDS, sizes, strict=True)) | own
    config = AutoConfig.for_model(
        architecture,
        initializer_range=spread,
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["hidden"] // shape["heads"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    return built(AutoModelForCausalLM.from_config, config, dtype, device)


def built(kind: Callable[[Any], Any], config: Any, dtype: torch.dtype, device: str) -> Any:
    """`kind(config)`, random and always the same, made where it is to be."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def tokenizer(vocabulary: int = 0) -> Any:
    """One token a byte: enough to start an engine with. Filled up to the size `vocabulary` with
    tokens of one letter and a number, which no text is split into, so that all ids have a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters += [f"t{number}" for number in range(len(letters), vocabulary)]
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>"
    )
