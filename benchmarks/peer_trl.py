"""TRL's side of the step benchmark: `DPOTrainer` on the inputs of `benchmarks.inputs`."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.inputs import BETA, DATA, LEARNING_RATE, LORA, LORA_TARGETS, MODEL, SEED, TOKENIZER, Shape
from benchmarks.measuring import MIB, Meter, StepClock, child, resident_mib


class _Ends(TrainerCallback):
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._clock()


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps; the reported memory leaves out the imports.

    ``config``: `folder` with model, tokenizer and rows, `shape`, `steps`, `checkpointing`, `lora`, `precompute`.
    """
    torch.set_num_threads(config["threads"])
    transformers.logging.set_verbosity_error()
    shape, folder, cpu = Shape(**config["shape"]), Path(config["folder"]), config["device"] == "cpu"
    lines = (folder / DATA).read_text(encoding="utf-8").splitlines()[: shape.batch * config["steps"]]
    dataset = Dataset.from_list([json.loads(line) for line in lines])
    tokenizer = AutoTokenizer.from_pretrained(str(folder / TOKENIZER))
    assert LlamaForCausalLM  # imported before the base is read
    base = resident_mib()
    model = AutoModelForCausalLM.from_pretrained(str(folder / MODEL), dtype=torch.float32)
    clock = StepClock(config["device"])
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        trainer = DPOTrainer(
            model=model,
            args=_arguments(config, shape, output),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=_adapters() if config.get("lora") else None,
            callbacks=[_Ends(clock)],
        )
        init = time.perf_counter() - start
        tokens = _check(trainer, shape)
        with Meter(config["device"]) as meter:
            trainer.train()
    parameters = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    everything, trainable = sum(n for n, _ in parameters), sum(n for n, trains in parameters if trains)
    state = 4 * (everything + 3 * trainable) / MIB
    return clock.report() | {
        "tokens_per_s": tokens / config["steps"] / clock.median,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_mib": meter.peak_mib,
        "base_mib": base if cpu else 0.0,
        "state_mib": state,
        "extra_mib": meter.peak_mib - state - (base if cpu else 0.0),
        "reference_s": init,
        "micro_batch": shape.batch,
        "parameters": everything,
        "trainable": trainable,
    }


def _adapters() -> LoraConfig:
    return LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=0.0,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )


def _arguments(config: dict[str, Any], shape: Shape, output: str) -> DPOConfig:
    return DPOConfig(
        output_dir=output,
        per_device_train_batch_size=shape.batch,
        max_steps=config["steps"],
        max_length=shape.seq_len,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=config["precompute"],
        precompute_ref_batch_size=shape.batch,
        gradient_checkpointing=config.get("checkpointing", True),
        use_liger_kernel=False,
        train_sampling_strategy="sequential",
        use_cpu=config["device"] == "cpu",
        bf16=config["dtype"] == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )


def _check(trainer: DPOTrainer, shape: Shape) -> int:
    """The number of tokens of all rows; raises an error if the batch does not have the requested shape."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows[: shape.batch])
    found = list(batch["input_ids"].shape)
    if found[0] != 2 * shape.batch or (not shape.ragged and found[1] != shape.seq_len):
        raise RuntimeError(f"the batch is {found}, not that of {shape}")
    return sum(int(trainer.data_collator([row])["attention_mask"].sum()) for row in rows)


if __name__ == "__main__":
    child(measure)
