"""TRL's SFTTrainer, as it is, on prompts with completions: it trains a sketched model's tables."""

import pytest
import torch

from helpers.training import losses, parameters, word_tokenizer
from spallm_convert import SketchConfig, convert, load_sketched, load_tables, save_tables

WORDS = [f"word{number}" for number in range(126)]


@pytest.mark.filterwarnings("ignore")  # TRL and datasets have warnings of their own
def test_sft_trainer_trains_the_tables(tiny_llama, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    convert(tiny_llama.folder, tmp_path / "base", SketchConfig(effort="fast", groups_per_row=2))
    model = load_sketched(tmp_path / "base", dtype=torch.float32)
    before = parameters(model)
    examples = [
        {"prompt": " ".join(WORDS[i : i + 4]) + " ", "completion": " ".join(WORDS[i + 4 : i + 10])}
        for i in range(24)
    ]
    options = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    run = SFTTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_list(examples),
        processing_class=word_tokenizer(),
    )
    run.train()
    curve = losses(run)
    assert len(curve) == 12
    assert sum(curve[-3:]) < 0.95 * sum(curve[:3])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith(".weight_table")}

    save_tables(model, tmp_path / "tuned")
    again = load_sketched(tmp_path / "base", dtype=torch.float32)
    load_tables(again, tmp_path / "tuned")
    tokens = torch.arange(2, 18)[None]
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
