"""Spoil sketched checkpoints: config, quantization_config, index, headers, data and report."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from .cases import kind
from .registering import documents_of, headers_of, shard, texts_of
from .spoiling import extra, join, odd_value, read, split, write


@kind("checkpoint", "header: length")
def header_length(folder: Path, rng: random.Random) -> None:
    """Change the length of the header."""
    path = shard(folder, rng)
    data = path.read_bytes()
    length = rng.choice((0, 1, 2, 7, 99_999_999, 100_000_000, 1 << 31, 1 << 62, (1 << 64) - 1))
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


@kind("checkpoint", "data: flipped")
def data_flipped(folder: Path, rng: random.Random) -> None:
    """Flip bits of the data alone: codes, tables, padding, dense tensors."""
    path = shard(folder, rng)
    _, body = split(path.read_bytes())
    spoiled = bytearray(body)
    for _ in range(rng.choice((1, 3, 30))):
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    path.write_bytes(path.read_bytes()[: -len(body)] + bytes(spoiled))


@kind("checkpoint", "data: not finite")
def data_not_finite(folder: Path, rng: random.Random) -> None:
    """Put NaN or infinity into a tensor."""
    path = shard(folder, rng)
    data = bytearray(path.read_bytes())
    header, body = split(bytes(data))
    names = [n for n, e in header.items() if n != "__metadata__" and e["dtype"] != "U8"]
    begin, _ = header[rng.choice(names)]["data_offsets"]
    at = len(data) - len(body) + begin
    data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x80\x7f\x80\x7f"))
    path.write_bytes(bytes(data))


@kind("checkpoint", "module: another shape")
def module_shape(folder: Path, rng: random.Random) -> None:
    """Change a number of a module, and often the tensors with it."""
    config = read(folder / "config.json")
    modules = config["quantization_config"]["modules"]
    module = modules[rng.choice(sorted(modules))]
    key = rng.choice(sorted(module))
    module[key] = rng.choice((1, 2, 4, 8, module[key] * 2, module[key] // 2, module[key] - 1))
    config["quantization_config"]["bits"] = max(m["bits"] for m in modules.values())
    write(folder / "config.json", config)


@kind("checkpoint", "module: experts")
def module_experts(folder: Path, rng: random.Random) -> None:
    """Make a layer fused experts or transposed, and often its tensors with it."""
    config = read(folder / "config.json")
    modules = config["quantization_config"]["modules"]
    name = rng.choice(sorted(modules))
    module = modules.pop(name)
    key = rng.choice(("experts", "experts", "transposed"))
    value = rng.choice((1, 2, 2, True, 0, 2**30) if key == "experts" else (True, True, False))
    module[key] = value
    if value == 2:
        module["out_features"] //= value
    modules[name + ".weight" if key == "experts" and rng.random() < 0.8 else name] = module
    write(folder / "config.json", config)
    if key == "experts" and value in (1, 2) and rng.random() < 0.8:
        for path in folder.glob("*.safetensors"):
            header, body = split(path.read_bytes())
            for tensor in (name + ".weight", name + ".weight_table"):
                if tensor in header:
                    first, *others = header[tensor]["shape"]
                    header[tensor]["shape"] = [value, first // value, *others]
            path.write_bytes(join(header, body))


@kind("checkpoint", "module: another name")
def module_name(folder: Path, rng: random.Random) -> None:
    """Give a module another name, in the config and in the header."""
    config = read(folder / "config.json")
    modules = config["quantization_config"]["modules"]
    old = rng.choice(sorted(modules))
    new = rng.choice(
        (old.removeprefix("model."), "model." + old, old.replace(".0.", ".1."), old + ".x", "\x1b[")
    )
    modules[new] = modules.pop(old)
    write(folder / "config.json", config)
    for path in folder.glob("*.safetensors"):
        header, body = split(path.read_bytes())
        for suffix in (".weight", ".weight_table"):
            if old + suffix in header:
                header[new + suffix] = header.pop(old + suffix)
        path.write_bytes(join(header, body))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        document = read(index)
        document["weight_map"] = {
            (new + name.removeprefix(old) if name.startswith(old + ".weight") else name): file
            for name, file in document["weight_map"].items()
        }
        write(index, document)


@kind("checkpoint", "module: of another layer")
def module_of_another_layer(folder: Path, rng: random.Random) -> None:
    """List a layer as sketched that is stored dense, or leave a sketched one out."""
    config = read(folder / "config.json")
    modules = config["quantization_config"]["modules"]
    some = modules[rng.choice(sorted(modules))]
    if rng.random() < 0.5:
        modules[rng.choice(("lm_head", "model.embed_tokens", "model.norm"))] = dict(some)
    else:
        del modules[rng.choice(sorted(modules))]
    write(folder / "config.json", config)


@kind("checkpoint", "config: another model")
def another_model(folder: Path, rng: random.Random) -> None:
    """Change what transformers builds from the config."""
    config = read(folder / "config.json")
    changes: dict[str, list[Any]] = {
        "architectures": [["GPT2LMHeadModel"], ["LlamaModel"], ["NoSuch"], [], None, [1], ["eval"]],
        "model_type": ["gpt2", "nothing", "", None, "mistral"],
        "hidden_size": [16, 64, 0, -32, 10**9, "32"],
        "intermediate_size": [16, 96, 10**12],
        "num_hidden_layers": [0, 1, 3, 100_000],
        "num_attention_heads": [1, 4, 0, 3],
        "vocab_size": [8, 65, 10**9],
        "tie_word_embeddings": [True, None, "yes"],
        "attention_bias": [False],
        "mlp_bias": [True],
        "dtype": ["float16", "float32", "float8", 3],
        "torch_dtype": ["float16", "complex64", "int8"],
        "auto_map": [{"AutoModelForCausalLM": "modeling.Model"}, {"AutoConfig": "x--y.Z"}, 3],
        "rope_parameters": [None, {}, {"rope_type": "yarn"}, {"rope_type": 3}],
        "hidden_act": ["gelu", "none", 5],
        "pad_token_id": [10**9, -1, "a"],
        "transformers_version": ["99.0", 3, None],
    }
    key = rng.choice(sorted(changes))
    config[key] = rng.choice(changes[key])
    write(folder / "config.json", config)


@kind("checkpoint", "config: without quantization_config")
def without_quantization(folder: Path, rng: random.Random) -> None:
    """Remove the object, or put another quantizer's there."""
    config = read(folder / "config.json")
    others = [None, {}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, []]
    config["quantization_config"] = rng.choice(others)
    if rng.random() < 0.3:
        del config["quantization_config"]
    write(folder / "config.json", config)


@kind("checkpoint", "files: both kinds of weights")
def both_kinds(folder: Path, rng: random.Random) -> None:
    """Add a single file to an index, an index to a single file, or pickled weights."""
    path = shard(folder, rng)
    if rng.random() < 0.3:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
        if rng.random() < 0.5:
            path.unlink()
    elif path.name == "model.safetensors":
        write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {}})
    else:
        shutil.copy(path, folder / "model.safetensors")


@kind("checkpoint", "files: extra ones")
def extra_files(folder: Path, rng: random.Random) -> None:
    """Add files that transformers reads if it finds them."""
    name = rng.choice(
        (
            "generation_config.json",
            "adapter_config.json",
            "processor_config.json",
            "config.json.bak",
        )
    )
    write(folder / name, extra({}, rng) if rng.random() < 0.5 else odd_value(rng))


documents_of("checkpoint", "config.json")
documents_of("checkpoint", "config.json", "quantization_config")
documents_of("checkpoint", "model.safetensors.index.json")
documents_of("checkpoint", "conversion.json")
texts_of("checkpoint", "config.json")
texts_of("checkpoint", "model.safetensors.index.json")
texts_of("checkpoint", "conversion.json")
headers_of("checkpoint")
