"""Save and swap tables in one process or several, whose model is whole, copied or sharded."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from helpers.training import counting
from spallm_convert import SpallmError, load_sketched, load_tables, save_tables, set_trainable


def shard(model):
    """Shard a model over all processes, layer by layer."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def swap_tables(model, output, rows):
    """Return losses with trained tables, with the same tables loaded, and with a changed base."""
    save_tables(model, output / "tables")
    found = [_evaluate(model, rows)]
    load_tables(model, output / "tables", name="again")
    found.append(_evaluate(model, rows))
    model.set_tables("base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    found.append(_evaluate(model, rows))
    model.set_tables("again")
    return [*found, _evaluate(model, rows)]


def tables_in_processes(folder, output):
    """Return what came of saving and loading tables, in a model of its own."""
    rows = torch.stack([example["input_ids"] for example in counting(4)])
    model = load_sketched(folder, dtype=torch.float32)
    several = dist.is_initialized()
    if several and dist.get_rank() == 0:
        save_tables(model, output / "by the first process")  # alone, and does not wait for others
    if several:
        dist.barrier()
        shard(model)
    found = {}
    load_tables(model, output / "tables", name="mine")
    model.lm_head.weight.requires_grad_(True)
    head = _whole(model.lm_head.weight)
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    found["head was trained"] = not torch.equal(_whole(model.lm_head.weight), head)
    model.set_tables("base")
    found["base has its head"] = torch.equal(_whole(model.lm_head.weight), head)
    found["refused"] = _refusal(lambda: save_tables(model, output / "tables"))
    (output / "a file").touch()
    found["a file"] = _refusal(lambda: save_tables(model, output / "a file"))
    found["no folder"] = _refusal(lambda: save_tables(model, output / "a file" / "below it"))
    if several:
        narrow = load_sketched(folder, dtype=torch.bfloat16)
        shard(narrow)
        found["too wide"] = _refusal(lambda: load_tables(narrow, output / "tables"))
    return found


def affine_in_processes(folder, output):
    """Return losses with a trained affine set, loaded again and without it, and what is refused."""
    rows = torch.stack([example["input_ids"] for example in counting(4)])
    model, plain = (load_sketched(folder, dtype=torch.float32) for _ in range(2))
    set_trainable(model, affine=True)
    if dist.is_initialized():
        shard(model)
        shard(plain)
    base = _evaluate(model, rows)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    found = {"base": base, "trained": _evaluate(model, rows)}
    save_tables(model, output / "affine")
    load_tables(model, output / "affine", name="again")
    found["again"] = _evaluate(model, rows)
    found["refused"] = _refusal(lambda: load_tables(plain, output / "affine"))
    return found


def _refusal(work):
    try:
        work()
    except (SpallmError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _whole(parameter):
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def _evaluate(model, rows):
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()
