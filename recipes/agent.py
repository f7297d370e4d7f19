"""Train an agent that uses a tool: SmolLM2-135M learns to ask a calculator, on the CPU.

    python recipes/agent.py
    python recipes/agent.py --steps 5 --output runs/try

The agent is an ordinary program with an OpenAI client. It asks the model twice: for a call of the
calculator, and, when it has told the model the result, for the answer. `attach` runs it for each
example of a step, and GRPO trains on the very tokens that the model said in both turns. The results
are in the output folder: see run_folder.py.
"""

import argparse
import json
import random
import re
from statistics import fmean

from datasets import Dataset
from openai import OpenAI
from rollout_server.integrations.trl import session_reward
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

import smollm2
from rollout_server import attach
from run_folder import RunFolder, as_markdown, summarize
from tasks import last_number

# One conversation as it should go. Short: a step's time grows with the tokens of all turns.
EXAMPLE = [
    {"role": "system", "content": "Use the calculator."},
    {"role": "user", "content": "What is 31 + 12?"},
    {"role": "assistant", "content": "<calc>31 + 12</calc>"},
    {"role": "user", "content": "Result: 43"},
    {"role": "assistant", "content": "43"},
]
CALL = re.compile(r"<calc>\s*(\d{1,4})\s*([-+*])\s*(\d{1,4})\s*</calc>")
WORTH = {"called": 0.3, "right_numbers": 0.3, "answered": 0.4}  # the parts of the reward


def agent(session, example):
    """One rollout: two turns with the model, and a reward for what it did in them."""
    messages = list(EXAMPLE)

    def ask(text: str) -> str:
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(model="policy", messages=messages)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content or ""})
        return messages[-1]["content"]

    with OpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        call = find_call(ask(example["prompt"]))
        answer = ask(f"Result: {calculate(*call)}" if call else "Result: none, there was no call.")

    asked = (example["a"], example["sign"], example["b"])
    did = {
        "called": call is not None,
        "right_numbers": call == asked,
        "answered": last_number(answer) == calculate(*asked),
    }
    reward = sum(WORTH[part] for part, done in did.items() if done)
    session.set_reward(reward, components={part: float(done) for part, done in did.items()})


def find_call(text: str) -> tuple[int, str, int] | None:
    """The first call of the calculator in a text, or None."""
    found = CALL.search(text)
    return (int(found[1]), found[2], int(found[3])) if found else None


def calculate(a: int, sign: str, b: int) -> int:
    """The calculator."""
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def rewards(reward, components, log_metric, **_):
    """TRL's reward function: what the agents set; the parts go into the log."""
    for part in WORTH:
        log_metric(f"agent/{part}", fmean(each.get(part, 0.0) for each in components))
    return session_reward(reward)


def make_dataset(size: int = 1000, seed: int = 0) -> Dataset:
    """Sums and differences of numbers with two digits."""
    draw, rows = random.Random(seed), []
    for sign in draw.choices("+-", k=size):
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        rows.append({"prompt": f"What is {a} {sign} {b}?", "a": a, "sign": sign, "b": b})
    return Dataset.from_list(rows)


def make_trainer(steps: int, output: str) -> GRPOTrainer:
    """The trainer; only its reward function knows that there is an agent."""
    settings = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,  # of each turn: what a request that doesn't say gets
        temperature=1.0,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=str(smollm2.model_folder()),
        args=settings,
        train_dataset=make_dataset(),
        reward_funcs=rewards,
    )
    # RunFolder shows the progress; these two would show it again.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def figures(logs: list[dict]) -> dict:
    """The run in figures, with those of the agent."""
    steps = [log for log in logs if "reward" in log]
    found = summarize(logs)
    for name, key in {"reward": "reward", **{part: f"agent/{part}" for part in WORTH}}.items():
        values = [log[key] for log in steps]
        found[f"{name}_first_5"], found[f"{name}_last_5"] = fmean(values[:5]), fmean(values[-5:])
    found["turns"] = fmean(log["rollout/turns"] for log in steps)
    found["failed"] = fmean(log["rollout/failed"] for log in steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="steps of training")
    parser.add_argument("--output", default="runs/agent", help="folder of the results")
    options = parser.parse_args()
    trainer = make_trainer(options.steps, options.output)
    run = RunFolder(options.output)
    trainer.add_callback(run)
    with attach(trainer, rollout=agent, max_model_len=256):
        trainer.train()
    found = figures(run.logs)
    (run.folder / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    (run.folder / "summary.md").write_text(as_markdown(found))
    print(f"\nThe run is recorded in {options.output}:\n\n{as_markdown(found)}")


if __name__ == "__main__":
    main()
