"""Log-probabilities of what was sampled, without what vLLM makes of them for OpenAI's answers."""

from typing import Any

from vllm.v1.engine.logprobs import LogprobsProcessor


class SampledLogprobs(LogprobsProcessor):
    """Keeps one number a token, the sampled one's, where vLLM keeps a dict, an object and a text.

    `logprobs` of an output is a list of floats (nats) then. For requests whose answer doesn't show
    them: vLLM would look for its own objects.
    """

    logprobs: Any
    cumulative_logprob: Any

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        sampled = logprobs_lists.logprobs[:, 0].tolist()  # it is the first of each row
        self.cumulative_logprob += sum(sampled)
        self.logprobs += sampled


def keep_sampled_alone(processor: LogprobsProcessor) -> None:
    """Have a new request's processor be a `SampledLogprobs`."""
    processor.__class__ = SampledLogprobs
