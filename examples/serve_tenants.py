"""Answer for several tenants at once: one base model, and tables of their own for each tenant.

    python examples/serve_tenants.py base --tables pirate=tables/pirate --tables brief=tables/brief

Needs vLLM (docs/serving.md). A folder of tables is what `save_tables` wrote. One batch holds every
question for every tenant, so vLLM computes them together.
"""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

QUESTIONS = ["What is the capital of France?", "What is the best food?"]
BASE = "base"


def main() -> None:
    options = parse()
    folders = dict(tables.split("=", 1) for tables in options.tables)
    # Each slot takes the bytes of a set. With more tenants than slots, vLLM lets some wait.
    engine = LLM(
        options.model,
        enable_lora=True,
        max_loras=options.slots or len(folders),
        max_cpu_loras=len(folders),
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=64,
    )
    # A number from 1 for each set. vLLM tells sets apart by it.
    requests = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(folders.items(), 1)
    }
    batch = [
        (question, tenant)
        for question in options.question or QUESTIONS
        for tenant in (BASE, *folders)
    ]
    answers = engine.chat(
        [[{"role": "user", "content": question}] for question, _ in batch],
        SamplingParams(temperature=0, max_tokens=options.tokens),
        lora_request=[requests.get(tenant) for _, tenant in batch],
        use_tqdm=False,
    )
    for tenant in (BASE, *folders):
        print(f"\n{tenant}")
        for (question, asker), answer in zip(batch, answers, strict=True):
            if asker == tenant:
                print(f"  {question}\n    {' '.join(answer.outputs[0].text.split())}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a sketched model with a chat template: a folder or an id")
    parser.add_argument(
        "--tables",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="the tables of a tenant; repeat it for each one",
    )
    parser.add_argument("--question", action="append", help="a question; repeat it for more")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--slots", type=int, help="tenants computed at a time (default: all)")
    parser.add_argument("--dtype", default="auto", help='"float32", for example')
    options = parser.parse_args()
    for tables in options.tables:
        name, equals, folder = tables.partition("=")
        if not (name and equals and folder) or name == BASE:
            parser.error(f"--tables {tables}: expected NAME=FOLDER, and another name than {BASE}")
    return options


if __name__ == "__main__":
    main()
