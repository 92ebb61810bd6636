"""Calibration on a device: the sketches of the CPU up to rounding, and clear errors."""

import contextlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from helpers.calibration import StopAt, calibrated, contents, options
from helpers.pretend_device import DEVICE, PretendDevice
from spallm_convert import (
    OptionError,
    SketchConfig,
    SpallmError,
    convert,
    load_sketched,
    plan_conversion,
)
from spallm_convert.calibration import backends
from spallm_convert.calibration.allocation import allocate
from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.cli import main
from spallm_convert.conversion import convert as conversion
from spallm_convert.conversion.identity import identity
from spallm_convert.conversion.texts import Texts
from spallm_convert.devices import (
    clear_memory_errors,
    find_device,
    full_float32,
    has_fast_bfloat16,
)
from spallm_formats import unpack
from spallm_kernels import batched


@pytest.fixture
def device(monkeypatch):
    """Make every conversion use a pretend device, whatever device is asked for."""
    monkeypatch.setattr(conversion, "find_device", lambda name: DEVICE)
    return PretendDevice()


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_a_device_gives_the_sketches_of_the_cpu(source, text, tmp_path, device, mapping):
    config = options(text, mapping=mapping, ignore=("model.layers.1.*",))
    ran = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backends, "prepare_hessian", lambda *a: ran.append("numba"))
        with device:
            found = convert(source, tmp_path / "device", config)
            convert(source, tmp_path / "again", config)
    assert device.ran > 1000
    assert ran == []
    assert contents(tmp_path / "device") == contents(tmp_path / "again")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conversion, "find_device", find_device)
        patched.setattr(batched, "prepare_hessian", lambda *a: ran.append("torch"))
        expected = convert(source, tmp_path / "cpu", config, device="cpu")
    assert ran == []
    assert found.document["device"] == DEVICE.type
    assert expected.document["device"] == "cpu"
    for total in ("relative_error", "relative_output_error"):
        assert found.totals[total] == pytest.approx(expected.totals[total], rel=0.01)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("device", "cpu"))
    assert ours.keys() == theirs.keys()
    for module in found.modules:
        assert_same_sketch(module["name"], ours, theirs)
    for name, tensor in ours.items():
        if f"{name}_table" not in ours and not name.endswith("_table"):
            assert torch.equal(tensor, theirs[name])
    load_sketched(tmp_path / "device")


def assert_same_sketch(name, ours, theirs):
    """Check that nearly all codes are equal, and tables are close."""
    maps = [tensors[f"{name}.weight"].numpy() for tensors in (ours, theirs)]
    if maps[0].size:
        columns = 48 if "down" in name else 32
        same = np.mean(np.equal(*(unpack(packed, 2, columns) for packed in maps)))
        assert same > 0.9, f"{name}: {same}"
    tables = [tensors[f"{name}.weight_table"] for tensors in (ours, theirs)]
    assert ((tables[0] - tables[1]).norm() / tables[1].norm()) < 0.1


def test_a_device_predicts_what_the_cpu_does(source, text, tmp_path, device, monkeypatch):
    """Allocate bits without numba, and check that no hidden states stay on the device."""
    choice = {"bits": 4, "groups_per_row": "auto", "table_dtype": "bfloat16", "target_bits": 8}
    config = options(text, ignore=("model.layers.1.*",), **choice)
    sets, given, ran = [], [], []
    choose, run = allocate.choose, Blocks.run

    def spied_run(self, number, block, hidden, *more, **named):
        given.append((hidden.device.type, hidden.requires_grad))
        return run(self, number, block, hidden, *more, **named)

    monkeypatch.setattr(allocate, "choose", lambda s, *a: sets.append(s) or choose(s, *a))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backends, "prepare_hessian", lambda *a: ran.append("numba"))
        patched.setattr(Blocks, "run", spied_run)
        with device:
            found = convert(source, tmp_path / "device", config)
    assert ran == []
    assert set(given) == {("cpu", False), (DEVICE.type, True)}  # the latter in the backward pass
    monkeypatch.setattr(conversion, "find_device", find_device)
    expected = convert(source, tmp_path / "cpu", config, device="cpu")
    ours, theirs = (
        {name: by_choice for fused in some for name, by_choice in fused.losses.items()}
        for some in sets
    )
    assert ours.keys() == theirs.keys()
    for name, losses in theirs.items():
        assert min(losses.values()) > 0
        assert ours[name] == pytest.approx(losses, rel=0.02), name
    bits = [{m["name"]: m["bits"] for m in report.modules} for report in (found, expected)]
    assert bits[0] == bits[1]
    assert len(set(bits[0].values())) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device gpu: unknown or unsupported; accepted are cpu and auto"),
        ("cuda:x", "device cuda:x: unknown or unsupported"),
        ("", "unknown or unsupported"),
        ("meta", "device meta: unknown or unsupported"),
        (None, "device None: unknown or unsupported"),
        ("cuda", "device cuda: torch finds no GPU here; accepted are cpu and auto"),
        ("cuda:1", "device cuda:1: torch finds no GPU here"),
    ],
)
def test_devices_that_are_not_there(name, message, source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError) as caught:
        convert(source, tmp_path / "out", options(text), device=name)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError) as caught:
        plan_conversion(source, options(text), device=name)
    assert message in str(caught.value)


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = {name: str(find_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")}
    assert names == {"auto": "cuda", "cpu": "cpu", "cuda": "cuda", "cuda:1": "cuda:1"}
    with pytest.raises(OptionError) as caught:
        find_device("cuda:2")
    message = "device cuda:2: torch finds 2 GPUs here; accepted are cpu, cuda, cuda:0, cuda:1 and"
    assert message in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")


def test_bfloat16_is_asked_of_the_device_itself(monkeypatch):
    assert isinstance(has_fast_bfloat16(torch.device("cpu")), bool)
    capabilities = [(7, 5), (8, 0)]
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    assert [has_fast_bfloat16(torch.device("cuda", number)) for number in (0, 1)] == [False, True]


def test_how_a_device_multiplies_counts_for_healing_alone(monkeypatch):
    tokens, cpu = torch.zeros(1, 2, dtype=torch.int64), torch.device("cpu")
    config = calibrated("text")
    for fast, name in ((True, "cpu, bfloat16"), (False, "cpu")):
        monkeypatch.setattr(
            "spallm_convert.conversion.identity.has_fast_bfloat16", lambda device, fast=fast: fast
        )
        for healing, expected in ((tokens, name), (None, "cpu")):
            same = identity(config, {}, Texts(tokens, healing), cpu)
            assert same["device"] == expected


def test_without_calibration_there_is_nothing_for_a_device(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = SketchConfig(effort="fast")
    with pytest.raises(OptionError, match="device cuda: effort 'fast' is done on the CPU"):
        convert(source, tmp_path / "out", config, device="cuda")
    for name in ("auto", "cpu"):
        report = convert(source, tmp_path / name, config, device=name)
        assert "device" not in report.document


def test_the_command_line_passes_the_device_on(source, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = [str(source), "-o", str(tmp_path / "out"), "--calibration", str(text)]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *more, "--device", "cuda:7"])
        assert stopped.value.code == 2
        assert "device cuda:7: torch finds no GPU here" in capsys.readouterr().err


def test_another_device_does_not_go_on_with_it(source, text, tmp_path, monkeypatch):
    output, config = tmp_path / "out", options(text)
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, config, device="cpu", progress=StopAt(9))
    monkeypatch.setattr(conversion, "find_device", lambda name: DEVICE)
    with pytest.raises(SpallmError, match=f"device was 'cpu.*', now '{DEVICE.type}'"):
        convert(source, output, config, resume=True)


def test_a_devices_memory_that_is_not_enough(source, text, tmp_path, monkeypatch):
    def fail(*arguments, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(backends, "prepare_hessian", fail)
    with pytest.raises(SpallmError, match=r"device cpu: .* Tried to allocate 3\.00 GiB\.$"):
        convert(source, tmp_path / "out", options(text), device="cpu")
    with (
        pytest.raises(SpallmError, match=r"3\.00 GiB\.; --device cpu needs no GPU memory"),
        clear_memory_errors(torch.device("cuda")),
    ):
        fail()


@pytest.mark.parametrize("empty", [torch.empty, np.empty])
def test_main_memory_that_is_not_enough_is_not_laid_to_the_model(
    empty, source, text, tmp_path, monkeypatch
):
    """Check that the conversion does not fall back either: the result would be needlessly worse."""

    def fail(*arguments, **how):
        empty(1 << 50)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", fail)
    config = options(text, fallback=True)
    with pytest.raises(SpallmError, match=r"device cpu: .*(can't|Unable to) allocate"):
        convert(source, tmp_path / "out", config, device="cpu")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_in_full_float32_and_settings_come_back(precision):
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    allowed = matmul.fp32_precision, matmul.allow_tf32
    try:
        with contextlib.suppress(KeyError), full_float32():
            assert matmul.fp32_precision == "ieee"
            assert not matmul.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == precision
        assert (matmul.fp32_precision, matmul.allow_tf32) == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_settings_by_their_newer_names_come_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # now torch refuses to read the setting by its older name
    try:
        with full_float32():
            assert matmul.fp32_precision == "ieee"
            assert not matmul.allow_tf32
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_calibration_runs_in_full_float32(source, text, tmp_path, monkeypatch):
    seen = []
    prepare = backends.prepare_hessian

    def spied(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return prepare(*arguments)

    monkeypatch.setattr(backends, "prepare_hessian", spied)
    torch.set_float32_matmul_precision("high")
    try:
        convert(source, tmp_path / "out", options(text), device="cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}
