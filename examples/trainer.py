"""transformers' Trainer with a patched model: only the prefix is trained, saved and resumed.

python examples/trainer.py [--model gpt2]
"""

import tempfile
from pathlib import Path

import common
from transformers import Trainer, TrainingArguments

import prefix_fast

arguments = common.options(__doc__)
model, tokenizer = common.causal_model(arguments.model)
prefix_fast.patch(model, 20)

with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=arguments.steps,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = common.encoded(tokenizer)
    trainer = Trainer(model, settings, lambda batch: common.padded(batch, tokenizer.pad_token_id), train_dataset=rows)
    trainer.train()
    common.report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    saved = sorted(path for path in Path(folder).rglob("*.safetensors"))
    print(f"a checkpoint's weights: {', '.join(f'{path.name} {path.stat().st_size >> 10} KB' for path in saved)}")
