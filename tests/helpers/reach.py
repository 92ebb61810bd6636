"""Take a tiny model of an architecture all the way, and record how far it gets.

`python -m helpers.reach --write`, with `tests` on the path, takes every architecture all the way
and writes `tests/helpers/reach.json` and `docs/models.md`. Names of model classes after it: only
these, whose records are printed.
"""

import contextlib
import json
import random
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from helpers.architectures import ARCHITECTURES, available, kind_of, save_tiny, tiny_inputs
from helpers.decoded import save_decoded, tensors_of
from helpers.reach_page import PAGE, page
from spallm_convert import (
    CalibrationConfig,
    Plan,
    SketchConfig,
    convert,
    load_sketched,
    plan_conversion,
)
from spallm_convert.errors import one_line

OPTIONS = {"bits": 4, "groups_per_row": 1}
RECORDS = Path(__file__).with_suffix(".json")
#: Seconds for one architecture. It takes 3 at most on one core.
TIMEOUT = 120
YES = "yes"
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
#: Ends of the names of tensors inside blocks that have two or three dimensions but multiply no
#: activations as a matrix does: biases, kernels of convolutions, states, tables of positions, ids.
_NOT_LINEAR = re.compile(
    r"(bias|bias_table|norm|conv(_?1d)?|A_log|time_mix_\w+|slope_rate|rel_pos_[hw]|ape|tid2eid)"
    r"(\.weight)?$"
)


@dataclass
class Reach:
    """Hold what became of one architecture.

    Attributes:
        name: The model class.
        kind: Its kind, as `helpers.architectures.KINDS` has it.
        share: Share of the linear weights that is sketched.
        dense: Kinds of layers that stay dense, with the share of each.
        bits: Bits per sketched weight, tables and padding included.
        difference: Largest difference between the outputs of the sketched model in float32 and
            those of the dense model with decoded weights, relative to the largest output.
        trained: YES, or why one training step fails.
        reached: Share of the tables that one training step reaches.
        saved: YES, or why a saved model does not load bit for bit.
        calibrated: YES, or why calibration is refused or fails.
        failure: Why the model is not converted, or does not run.
    """

    name: str
    kind: str
    share: float | None = None
    dense: dict[str, float] | None = None
    bits: float | None = None
    difference: float | None = None
    trained: str | None = None
    reached: float | None = None
    saved: str | None = None
    calibrated: str | None = None
    failure: str | None = None


def reach(name: str, folder: Path, *, calibrate: bool = True) -> Reach:
    """Take one architecture all the way: plan, convert, compare, train, save, load, calibrate.

    Args:
        name: A class of `helpers.architectures.ARCHITECTURES`.
        folder: An empty folder to work in.
        calibrate: Whether to convert with calibration too.

    Returns:
        The record. An exception becomes the reason of what it ended.
    """
    found = Reach(name, kind_of(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about configs of tiny models
        found.failure = _reason(_convert, found, folder)
        if found.failure is None:
            found.trained = _reason(_train, found, folder) or YES
            found.saved = _reason(_save, found, folder) or YES
        if calibrate and found.share is not None:
            found.calibrated = _reason(_calibrate, found, folder) or YES
    return found


def _reason(step: Callable[[Reach, Path], None], found: Reach, folder: Path) -> str | None:
    """Run a step; return the reason if it fails, without the path of this machine."""
    try:
        step(found, folder)
    except Exception as error:  # whatever it is, the other architectures go on
        return f"{type(error).__name__}: {one_line(error)}".replace(f"{folder}/", "")
    return None


def _convert(found: Reach, folder: Path) -> None:
    source = save_tiny(found.name, folder / "source")
    plan = plan_conversion(source, SketchConfig(effort="fast", **OPTIONS))
    found.share, found.dense = sketched_share(plan)
    found.bits = plan.totals()["bits_per_weight"]
    convert(source, folder / "out", SketchConfig(effort="fast", **OPTIONS))
    copy = save_decoded(folder / "out", source, folder / "decoded")
    expected = _outputs(found.name, _model_class(found.name).from_pretrained(copy))
    outputs = _outputs(found.name, _loaded(folder / "out"))
    assert len(outputs) == len(expected) > 0
    found.difference = max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(outputs, expected, strict=True)
    )


def sketched_share(plan: Plan) -> tuple[float, dict[str, float]]:
    """Return the sketched share of the linear weights, and the share of each kind left dense.

    Linear weights are all matrices that are stored inside blocks, those of experts and routers
    among them. They are counted here from names and shapes, not as the plan counts them.
    """
    dense: Counter[str] = Counter()
    for name, tensor in plan.kept.items():
        is_matrix = len(tensor.shape) in (2, 3) and _IN_BLOCK.search(name.removesuffix(".weight"))
        if is_matrix and not _NOT_LINEAR.search(name):
            dense[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)] += tensor.elements
    total = plan.sketched_weights + dense.total()
    return plan.sketched_weights / total, {kind: dense[kind] / total for kind in sorted(dense)}


def _train(found: Reach, folder: Path) -> None:
    """Take one step; the tables that the loss depends on change, and nothing else does."""
    model = _loaded(folder / "out").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    outputs = tensors_in(model(**tiny_inputs(found.name, model)))
    losses = [value.square().mean() for value in outputs if value.requires_grad]
    assert losses, "no table is reached"
    torch.stack(losses).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    tables = {name for name in before if name.endswith("_table")}
    reached = {name for name, gradient in gradients.items() if gradient.any()}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    found.reached = len(reached) / len(tables)
    assert reached, "no table is reached"
    assert all(gradient.isfinite().all() for gradient in gradients.values()), "not finite"
    assert gradients.keys() <= tables, "other parameters than tables have gradients"
    assert changed == reached, "other parameters than those with a gradient have changed"
    model.eval().save_pretrained(folder / "trained")
    expected = _outputs(found.name, model)
    assert _equal(_outputs(found.name, _loaded(folder / "trained")), expected), "loads otherwise"


def _save(found: Reach, folder: Path) -> None:
    """Save what was loaded; its files hold the same tensors, and it has the same outputs."""
    model = _loaded(folder / "out")
    model.save_pretrained(folder / "saved")
    original, saved = tensors_of(folder / "out"), tensors_of(folder / "saved")
    assert saved.keys() == original.keys(), (
        f"names differ: {sorted(saved.keys() ^ original.keys())[:4]}"
    )
    for name, tensor in saved.items():
        is_table = name.endswith("_table")
        dtype = torch.float32 if is_table else original[name].dtype
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}"
        assert torch.equal(tensor, original[name].to(dtype)), f"{name} differs"
    expected = _outputs(found.name, model)
    assert _equal(_outputs(found.name, _loaded(folder / "saved")), expected), "outputs differ"


def _calibrate(found: Reach, folder: Path) -> None:
    """Convert with calibration; the result loads and runs.

    transformers chooses the tokenizer by the model's type, whatever files there are, and most of
    them cannot be tiny. So all models get the same one.
    """
    text = folder / "text.txt"
    draw = random.Random(0)
    text.write_text(" ".join(f"word{draw.randrange(_WORDS)}" for _ in range(400)))
    calibration = CalibrationConfig(text=str(text), samples=4, seqlen=16)
    out = folder / "calibrated"
    with mock.patch("transformers.AutoTokenizer.from_pretrained", return_value=small_tokenizer()):
        convert(folder / "source", out, SketchConfig(calibration=calibration, **OPTIONS))
    assert all(value.isfinite().all() for value in _outputs(found.name, _loaded(out)))


_WORDS = 50


def small_tokenizer() -> Any:
    """Return a tokenizer whose ids have embeddings in all tiny models: "word0" to "word49"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<start>": 1, "<end>": 2} | {f"word{n}": 3 + n for n in range(_WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def _model_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _loaded(folder: Path) -> Any:
    return load_sketched(folder, dtype=torch.float32)


def _outputs(name: str, model: Any) -> list[torch.Tensor]:
    """Return the outputs of one forward pass in evaluation mode."""
    with torch.no_grad():
        return tensors_in(model.eval()(**tiny_inputs(name, model)))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of floats in an output, also in nested ones; caches are left out."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    return [tensor for part in parts for tensor in tensors_in(part)]


def _equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in code that takes longer, and again in what goes on after it."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes more than {seconds:g} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def limited_reach(name: str, seconds: float = TIMEOUT) -> Reach:
    """Take one architecture all the way in a folder of its own, in limited time."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _limited(seconds):
                return reach(name, Path(folder))
        except TimeoutError as error:  # between two steps
            return Reach(name, kind_of(name), failure=f"TimeoutError: {error}")


def read_records() -> tuple[str, list[Reach]]:
    """Return the version of transformers of the last `--write`, and its records."""
    document = json.loads(RECORDS.read_text())
    return document["transformers"], [Reach(**entry) for entry in document["records"]]


def write_records(version: str, found: list[Reach]) -> None:
    """Write the records, rounded so that another machine writes the same, and their page."""
    entries = [json.dumps(asdict(record), default=str) for record in found]
    RECORDS.write_text(
        f'{{"transformers": "{version}", "records": [\n' + ",\n".join(entries) + "\n]}\n"
    )
    PAGE.write_text(page(*read_records()))


def main(arguments: list[str]) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    write = arguments == ["--write"]
    names = [n for n in (ARCHITECTURES if write else arguments) if available(n)]
    found = []
    for name in names:
        found.append(limited_reach(name))
        print(json.dumps(asdict(found[-1])), flush=True)
    if write:
        write_records(transformers.__version__, found)


if __name__ == "__main__":
    main(sys.argv[1:])
