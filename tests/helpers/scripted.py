"""A policy that says what a script has, and a server of it: each token is followed by one other.

Its layers add nothing to what goes through them, so what comes next depends on the last token
alone. Where a script has several, the likeliest is sampled, and `logit_bias` makes another that.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from support import tiny_sizes
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

_WIDTH = 128


def scripted(tokenizer: PreTrainedTokenizerBase, script: Mapping[int, Sequence[int]]):
    """A model that samples of `script[i]`, the first most likely, after token `i`."""
    config = Qwen2Config(
        **tiny_sizes(
            len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=1,
            max_position_embeddings=2048,
        ),
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    assert len(script) < _WIDTH
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        embedded, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedded[:, _WIDTH - 1] = 1
        for at, (token, following) in enumerate(script.items()):
            embedded[token] = 0
            embedded[token, at] = 1
            for place, one in enumerate(following):
                head[one, at] = 3 - 0.5 * place
    return model


def chain(*tokens: int) -> dict[int, list[int]]:
    """Each followed by the next."""
    return {token: [following] for token, following in itertools.pairwise(tokens)}
