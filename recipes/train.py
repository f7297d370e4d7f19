"""Train a language model on a verifiable task; the policy can be called over HTTP all the while.

    accelerate launch --config_file recipes/accelerate/cpu.yaml \\
        recipes/train.py --config recipes/training/demo.yaml

Every field of the YAML can be given on the command line too (`--max_steps 5`). Besides the fields
below, they are those of TRL's GRPOConfig (or RLOOConfig) and ModelConfig. The results are in
`output_dir`: see run_folder.py.
"""

import json
import shlex
from dataclasses import dataclass, field

from transformers import PrinterCallback, ProgressCallback
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
    TrlParser,
    get_peft_config,
)

import smollm2
import tasks
from rollout_server import attach
from run_folder import RunFolder

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


@dataclass
class RecipeArguments:
    """What this script adds to TRL's own settings."""

    trainer: str = field(default="grpo", metadata={"help": "grpo or rloo"})
    task: str = field(default="chain_sum", metadata={"help": f"one of {', '.join(tasks.TASKS)}"})
    task_options: dict | str | None = field(
        default=None, metadata={"help": "options of the task's reasoning-gym dataset (a mapping)"}
    )
    task_size: int = field(default=1000, metadata={"help": "number of prompts"})
    task_seed: int = field(default=0, metadata={"help": "seed that the prompts are drawn with"})
    system_prompt: str | None = field(
        default=tasks.SYSTEM_PROMPT, metadata={"help": "system message of every prompt"}
    )
    rollout: dict | str | None = field(
        default=None, metadata={"help": "options of rollout_server.attach (a mapping)"}
    )

    def __post_init__(self):
        if self.trainer not in TRAINERS:
            raise ValueError(f"trainer is {self.trainer!r}; it must be grpo or rloo")
        self.task_options = _mapping(self.task_options)
        self.rollout = _mapping(self.rollout)


def _mapping(value: dict | str | None) -> dict:
    # A mapping in the YAML; JSON on the command line.
    return json.loads(value) if isinstance(value, str) else value or {}


def parse_arguments(args: list[str] | None = None):
    """(RecipeArguments, the trainer's config, ModelConfig) from a YAML and the command line."""
    # The trainer decides which config class parses the rest, so it is read by itself first.
    first = TrlParser([RecipeArguments], allow_abbrev=False)
    recipe, _ = first.parse_args_and_config(args, return_remaining_strings=True)
    _, config_class = TRAINERS[recipe.trainer]
    parser = TrlParser([RecipeArguments, config_class, ModelConfig], allow_abbrev=False)
    return parser.parse_args_and_config(args)


def make_trainer(recipe: RecipeArguments, config: GRPOConfig | RLOOConfig, model: ModelConfig):
    """The trainer, with its model, data and reward."""
    trainer_class, _ = TRAINERS[recipe.trainer]
    source = model.model_name_or_path or "smollm2"
    if source == "smollm2":
        source = str(smollm2.model_folder())
    given = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    config.model_init_kwargs = {
        **{name: value for name, value in given.items() if value is not None},
        **_mapping(config.model_init_kwargs),
    }
    trainer = trainer_class(
        model=source,
        args=config,
        reward_funcs=tasks.exact_answer,
        train_dataset=tasks.make_dataset(
            recipe.task,
            recipe.task_size,
            recipe.task_seed,
            recipe.task_options,
            recipe.system_prompt,
        ),
        callbacks=[RunFolder(config.output_dir)],
        peft_config=get_peft_config(model),
    )
    # RunFolder shows the progress; these two would show it again.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def curl_command(base_url: str, api_key: str) -> str:
    """A command line that asks the policy something."""
    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": "What is 2 + 3?"}],
        "max_tokens": 32,
    }
    headers = ["-H", f"Authorization: Bearer {api_key}", "-H", "Content-Type: application/json"]
    return shlex.join(
        ["curl", "-s", f"{base_url}/chat/completions", *headers, "-d", json.dumps(body)]
    )


def main() -> None:
    recipe, config, model = parse_arguments()
    trainer = make_trainer(recipe, config, model)
    with attach(trainer, **recipe.rollout) as server:
        if trainer.is_world_process_zero():
            print(f"\nThe policy answers at {server.base_url}; while it trains, try:\n")
            print(f"    {curl_command(server.base_url, server.api_key)}\n", flush=True)
        trainer.train()
    if trainer.is_world_process_zero():
        print(f"\nThe run is recorded in {config.output_dir}:\n")
        with open(f"{config.output_dir}/summary.md") as summary:
            print(summary.read())


if __name__ == "__main__":
    main()
