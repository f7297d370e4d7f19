"""Serving a LoRA adapter: what vLLM is started with for it, and how requests come to use it."""

from typing import Any

from rollout_server.errors import NotAvailableError
from rollout_server.weights.wire import ADAPTER_ID

# vLLM's MaxLoRARanks, the same from 0.26 to 0.33.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def adapter_arguments(adapter: Any) -> dict[str, Any]:
    """Fields for `AsyncEngineArgs` that make room for an `Adapter` of the trainer's."""
    rank = adapter.rank
    if rank > RANKS[-1]:
        raise NotAvailableError(
            f"the adapter has rank {rank}, vLLM's LoRA layers take {RANKS[-1]}; use peft='merge'"
        )
    modules = {b.partition(".lora_")[0].rpartition(".")[2] for b in adapter.scaling}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(r for r in RANKS if r >= rank),
        # Without this each linear layer and the embeddings get buffers, and take their time.
        "lora_target_modules": sorted(modules),
    }


def use_adapter(client: Any, name: str) -> None:
    """Have every request of an `AsyncLLM` use the adapter, whatever route or name it came by.

    All of vLLM's routes come through `generate`, with no adapter for the served names.
    """
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest(lora_name=name, lora_int_id=ADAPTER_ID, lora_path="in-memory")
    generate = client.generate

    def adapted(*args: Any, lora_request: Any = None, **options: Any) -> Any:
        return generate(*args, lora_request=adapter, **options)

    client.generate = adapted
