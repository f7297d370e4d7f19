"""Tiny random models that see images, and processors for them, made in memory.

The tokenizer is SmolLM2's with the model's own tokens added; nothing is fetched. Processors of
videos need torchvision, so those of Qwen are made where there is one.
"""

import base64
import inspect
import io
import random

import torch
from PIL import Image
from transformers import AutoTokenizer

from smollm2 import model_folder

# The chat template of all: ChatML, with the mark of each image where it stands.
_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in
message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif
%}{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.1,
)
_SEEING = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)


def _tokenizer(mark, **tokens):
    """SmolLM2's with `tokens`, by the names that a processor looks for; mark: of an image."""
    tokenizer = AutoTokenizer.from_pretrained(
        str(model_folder()),
        extra_special_tokens=tokens,
        chat_template=_TEMPLATE.replace("IMAGE", mark),
    )
    return tokenizer


def _text(tokenizer, **more):
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return _TEXT | ids | dict(vocab_size=len(tokenizer)) | more


def idefics3():
    """Idefics 3 (as SmolVLM is): an image is cut into tiles of 4 tokens each."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _tokenizer("<image>")
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<fake_token_around_image>",
                "<image>",
                "<end_of_utterance>",
                "<global-img>",
                *tiles,
            ]
        }
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    config = Idefics3Config(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_SEEING | dict(num_hidden_layers=2, image_size=32, patch_size=8),
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _made(Idefics3ForConditionalGeneration, config), processor


def gemma3():
    """Gemma 3: an image is 4 tokens, which see each other both ways."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = _tokenizer(
        "<start_of_image>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    config = Gemma3Config(
        text_config=_text(tokenizer, head_dim=32, sliding_window=64, query_pre_attn_scalar=32),
        vision_config=_SEEING | dict(num_hidden_layers=2, image_size=32, patch_size=8),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _made(Gemma3ForConditionalGeneration, config), processor


def llava():
    """LLaVA: an image is 16 tokens without any around them."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer("<image>", image_token="<image>")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    config = LlavaConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_SEEING
        | dict(
            model_type="clip_vision_model",
            num_hidden_layers=3,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        ),
        image_token_index=tokenizer.image_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _made(LlavaForConditionalGeneration, config), processor


def qwen2_5_vl():
    """Qwen2.5-VL: as many tokens as an image is large, and positions in three dimensions."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    processor = _of_qwen(Qwen2_5_VLProcessor, 14)
    config = Qwen2_5_VLConfig(
        text_config=_text(processor.tokenizer, rope_parameters=_rope([4, 6, 6])),
        vision_config=_SEEING
        | dict(
            depth=2, num_heads=2, out_hidden_size=128, window_size=56, fullatt_block_indexes=[1]
        ),
        **_ids_of_qwen(processor.tokenizer),
    )
    return _made(Qwen2_5_VLForConditionalGeneration, config), processor


def qwen3_vl():
    """Qwen3-VL: as Qwen2.5-VL, and what early layers see goes into the model's early layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    processor = _of_qwen(Qwen3VLProcessor, 16)
    config = Qwen3VLConfig(
        text_config=_text(processor.tokenizer, head_dim=32, rope_parameters=_rope([6, 5, 5])),
        vision_config=_SEEING
        | dict(
            depth=3,
            num_heads=2,
            out_hidden_size=128,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        **_ids_of_qwen(processor.tokenizer),
    )
    return _made(Qwen3VLForConditionalGeneration, config), processor


def _of_qwen(kind, patch):
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    sizes = dict(patch_size=patch, min_pixels=(4 * patch) ** 2, max_pixels=(8 * patch) ** 2)
    videos = Qwen2VLVideoProcessor(**sizes)
    return kind(
        Qwen2VLImageProcessor(**sizes), tokenizer, videos, chat_template=tokenizer.chat_template
    )


def _ids_of_qwen(tokenizer):
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names)
    return dict(
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        eos_token_id=tokenizer.eos_token_id,
    )


def _rope(section):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def _made(kind, config):
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():  # a random tower says next to nothing otherwise
        for name, parameter in model.named_parameters():
            if "vision" in name and parameter.ndim > 1:
                parameter.mul_(5)
    return model


def picture(seed, size=(48, 40)):
    """An image of four random fields."""
    chosen = random.Random(seed)
    image = Image.new("RGB", (2, 2))
    image.putdata([tuple(chosen.randrange(256) for _ in range(3)) for _ in range(4)])
    return image.resize(size, Image.NEAREST)


def data_url(image):
    written = io.BytesIO()
    image.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def user(text, *images):
    """A user's message as transformers has it: its images first."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def user_over_http(text, *images):
    """The same, as a client of the OpenAI API sends it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def seen_logprobs(model, processor, prompt_ids, ids, images):
    """The model's own log-probabilities of `ids` after `prompt_ids`, which hold `images`."""
    inputs = dict(processor.image_processor(images=[images], return_tensors="pt"))
    inputs.pop("num_crops", None)
    all_ids = torch.tensor([[*prompt_ids, *ids]])
    names = ("image_token_id", "image_token_index")
    token = next(getattr(model.config, name) for name in names if hasattr(model.config, name))
    for name in ("token_type_ids", "mm_token_type_ids"):  # Gemma's, Qwen's
        if name in inspect.signature(model.forward).parameters:
            inputs[name] = (all_ids == token).long()
    with torch.no_grad():
        inputs |= {"input_ids": all_ids, "attention_mask": torch.ones_like(all_ids)}
        logits = model(**inputs).logits[0].float()
    told = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return told.gather(1, torch.tensor(ids)[:, None])[:, 0]


def ask(client, messages, **fields):
    fields = dict(max_tokens=12, temperature=1, logprobs=True, return_token_ids=True) | fields
    body = dict(model="policy", messages=messages, ignore_eos=True) | fields
    return client.post("/chat/completions", cast_to=object, body=body)


def tokens(answer):
    """(prompt ids, sampled ids, their log-probabilities)"""
    choice = answer["choices"][0]
    logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
    return answer["prompt_token_ids"], choice["token_ids"], torch.tensor(logprobs)


def rendered(processor, messages):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]


def change(model, of=""):
    """Other weights, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if of in name:
                parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))


def far(ours, theirs):
    return (torch.as_tensor(ours) - theirs).abs().max().item()
