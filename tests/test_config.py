"""What `attach` says of bad options, before anything is started."""

import pytest
import torch

from rollout_server import RolloutConfig, attach
from rollout_server.errors import ConfigError, NotAvailableError


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"hold_timout": 3}, ["hold_timout", "hold_timeout"]),
        ({"completely_else": 3}, ["completely_else", "host"]),
        ({"port": 70000}, ["port=70000", "65535"]),
        ({"port": "80"}, ["port='80'"]),
        ({"colocate": "sleeep"}, ["colocate='sleeep'", "'sleep'"]),
        ({"dtype": "fp8"}, ["dtype='fp8'", "bfloat16"]),
        ({"hold_timeout": -1}, ["hold_timeout=-1", "seconds"]),
        ({"hold_timeout": float("nan")}, ["hold_timeout=nan"]),
        ({"sync_timeout": True}, ["sync_timeout=True"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization=1.5"]),
        ({"kv_cache_memory_bytes": 0}, ["kv_cache_memory_bytes=0"]),
        ({"max_model_len": 2.5}, ["max_model_len=2.5"]),
        ({"engine_args": []}, ["engine_args=[]", "dict"]),
        ({"sampling": "hot"}, ["sampling='hot'"]),
        ({"progress": 1}, ["progress=1"]),
        ({"served_model_name": " "}, ["served_model_name"]),
        ({"in_flight": "abort"}, ["in_flight='abort'", "interrupt", "drain"]),
        ({"sync_path": "fast"}, ["sync_path='fast'", "layerwise"]),
        ({"check_finite": True}, ["check_finite=True", "verified"]),
        ({"peft": "lora"}, ["peft='lora'", "adapter"]),
        ({"max_body_bytes": 5}, ["max_body_bytes=5", "1024"]),
        ({"max_connections": 0}, ["max_connections=0"]),
        ({"max_held_requests": -1}, ["max_held_requests=-1"]),
        ({"max_running_requests": 0}, ["max_running_requests=0"]),
        ({"client_timeout": 0}, ["client_timeout=0", "seconds"]),
        ({"sync_bucket_bytes": 1000}, ["sync_bucket_bytes=1000", "65536"]),
        (
            {"offload_optimizer": True, "colocate": "resident"},
            ["offload_optimizer=True", "colocate='resident'", "'sleep'"],
        ),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_the_remedy(options, parts):
    with pytest.raises(ConfigError) as error:
        RolloutConfig.of(options)
    for part in parts:
        assert part in str(error.value)


def test_what_is_not_there_yet_says_so():
    with pytest.raises(NotAvailableError, match=r"engine_args\['data_parallel_size'\]=2"):
        RolloutConfig(engine_args={"data_parallel_size": 2})


def test_an_engine_of_several_ranks_is_not_restarted():
    assert RolloutConfig(max_restarts=2).restarts == 2
    assert RolloutConfig(max_restarts=2, engine_args={"tensor_parallel_size": 2}).restarts == 0


def test_tensor_parallel_needs_the_ranks_for_it():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size'\]=-2"):
        RolloutConfig(engine_args={"tensor_parallel_size": -2})
    with pytest.raises(ConfigError, match="colocate='share'"):
        RolloutConfig(engine_args={"tensor_parallel_size": 2}, colocate="share")
    with pytest.raises(ConfigError, match=r"has 1 rank of .*accelerate launch"):
        attach(torch.nn.Linear(2, 2), object(), engine_args={"tensor_parallel_size": 2})


def test_a_key_is_never_shown():
    config = RolloutConfig(api_key="secret-of-mine")
    assert "secret-of-mine" not in repr(config)
    with pytest.raises(ConfigError) as error:
        RolloutConfig(api_key="two words")
    assert "two words" not in str(error.value)


def test_every_option_is_documented():
    for name in RolloutConfig.__dataclass_fields__:
        assert f"{name}" in RolloutConfig.__doc__, name


def test_attach_refuses_what_is_neither_trainer_nor_model():
    with pytest.raises(ConfigError, match="GRPOTrainer"):
        attach(object())
    with pytest.raises(ConfigError, match=r"offload_optimizer=True.*optimizer=\.\.\."):
        attach(torch.nn.Linear(2, 2), object(), offload_optimizer=True)
    with pytest.raises(ConfigError, match="progres"):
        attach(object(), object(), progres=False)
