"""What a real engine has allocated, beside what is reckoned for its model."""

import inside
import pytest

from rollout_server.memory.kv_cache import kv_cache_of
from rollout_server.memory.model import engine_bytes, parameter_shapes

pytestmark = pytest.mark.slow


def test_what_the_engine_allocated(server, shared_model):
    config = shared_model.config
    held = server.memory()
    shapes = parameter_shapes(shared_model)
    assert held["weights"] == engine_bytes(shapes, 4, 1, config.num_key_value_heads)
    cache = inside.client(server).vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    assert tokens > 10_000
    assert held["kv_cache"] == tokens * kv_cache_of(config, 4, 1, 2048).token_bytes
