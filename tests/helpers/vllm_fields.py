"""Every field of the requests that vLLM's routes take, as of `VERSION`, and what becomes of it.

Allowed: it goes to vLLM as it is, within the bounds of http/refusals.py; refused: a request that
gives it gets 400. A field that vLLM adds is put here by somebody who has read what it does: one
that names a file, an address, code, or another engine is refused.
"""

from typing import NamedTuple

from rollout_server import vllm_compat

VERSION = (0, 32)


def vllms_app():
    """vLLM's FastAPI app with its routes, without an engine."""
    build_app, _ = vllm_compat.app_builders()
    return build_app(vllm_compat.frontend_arguments(), ("generate",), None)


class Fields(NamedTuple):
    """The names of one model's fields, by class."""

    allowed: str
    refused: str = ""

    @property
    def names(self):
        return {*self.allowed.split(), *self.refused.split()}


# By the names of vLLM's models.
MODELS = {
    "AnthropicCountTokensRequest": Fields(
        allowed="""
        chat_template_kwargs messages model output_config system thinking tool_choice tools
        """,
    ),
    "AnthropicMessagesRequest": Fields(
        allowed="""
        cache_salt chat_template_kwargs max_tokens messages metadata mm_payload model
        output_config return_mm_kwargs stop_sequences stream system temperature thinking
        tool_choice tools top_k top_p watermarking
        """,
        refused="""
        ec_transfer_params kv_transfer_params vllm_xargs
        """,
    ),
    "ChatCompletionRequest": Fields(
        allowed="""
        add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt
        chat_template_kwargs continue_final_message documents echo frequency_penalty
        ignore_eos include_reasoning include_stop_str_in_output length_penalty logit_bias
        logprob_token_ids logprobs max_completion_tokens max_tokens messages min_p
        min_tokens mm_payload model n parallel_tool_calls presence_penalty prompt_logprobs
        reasoning_effort repetition_detection repetition_penalty request_id response_format
        return_mm_kwargs return_prompt_text return_token_ids return_token_offsets
        return_tokens_as_token_ids return_weight_versions routed_experts_prompt_start seed
        session_id skip_special_tokens spaces_between_special_tokens stop stop_token_ids
        stream stream_interval stream_options structured_outputs temperature
        thinking_token_budget tool_choice tools top_k top_logprobs top_p
        truncate_prompt_tokens truncation_side user watermarking
        """,
        refused="""
        chat_template ec_transfer_params kv_transfer_params media_io_kwargs
        mm_processor_kwargs priority use_beam_search vllm_xargs
        """,
    ),
    "CompletionRequest": Fields(
        allowed="""
        add_special_tokens allowed_token_ids bad_words cache_salt echo frequency_penalty
        ignore_eos include_stop_str_in_output length_penalty logit_bias logprob_token_ids
        logprobs max_tokens min_p min_tokens mm_payload model n presence_penalty prompt
        prompt_logprobs repetition_detection repetition_penalty request_id response_format
        return_mm_kwargs return_token_ids return_token_offsets return_tokens_as_token_ids
        return_weight_versions routed_experts_prompt_start seed session_id skip_special_tokens
        spaces_between_special_tokens stop stop_token_ids stream stream_interval
        stream_options structured_outputs suffix temperature thinking_token_budget top_k
        top_p truncate_prompt_tokens truncation_side user watermarking
        """,
        refused="""
        ec_transfer_params kv_transfer_params priority prompt_embeds use_beam_search
        vllm_xargs
        """,
    ),
    "DetokenizeRequest": Fields(
        allowed="""
        model tokens
        """,
    ),
    "ResponsesRequest": Fields(
        allowed="""
        prompt_cache_options prompt_cache_retention safety_identifier
        spaces_between_special_tokens
        background cache_salt chat_template_kwargs enable_response_messages
        frequency_penalty ignore_eos include include_reasoning include_stop_str_in_output
        input instructions logit_bias max_output_tokens max_tool_calls metadata min_p
        mm_payload model parallel_tool_calls presence_penalty
        previous_response_id prompt prompt_cache_key reasoning repetition_penalty request_id
        return_mm_kwargs seed service_tier session_id skip_special_tokens stop
        stop_token_ids store stream structured_outputs temperature text tool_choice tools
        top_k top_logprobs top_p truncation user watermarking
        """,
        refused="""
        ec_transfer_params kv_transfer_params media_io_kwargs mm_processor_kwargs
        previous_input_messages priority vllm_xargs
        """,
    ),
    "TokenizeChatRequest": Fields(
        allowed="""
        add_generation_prompt add_special_tokens chat_template_kwargs continue_final_message
        messages model return_token_strs tools
        """,
        refused="""
        chat_template media_io_kwargs mm_processor_kwargs
        """,
    ),
    "TokenizeCompletionRequest": Fields(
        allowed="""
        add_special_tokens model prompt return_token_strs
        """,
    ),
}

# Fields that a later version than `VERSION` has, whose sources alone were looked at.
LATER = """
    prompt_cache_options prompt_cache_retention return_weight_versions safety_identifier
    spaces_between_special_tokens
"""

# Refused as well: fields of earlier versions and of other servers, which vLLM might have some day.
GONE = """
    custom_logit_processor extra_args guided_choice guided_decoding_backend guided_grammar
    guided_json guided_regex logits_processors lora_path lora_request
    return_assistant_tokens_mask
"""

# Ours: the server takes these out of a body itself, so vLLM must not have any of them.
OURS = "on_sync required_prefix_token_ids unmasked_logprobs"
