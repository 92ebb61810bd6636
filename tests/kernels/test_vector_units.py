"""The choice of vector instructions: by machine, by `SPALLM_CPU`, by kind of sketch."""

import llvmlite.binding as llvm
import pytest
import torch

from helpers.sketches import random_sketch
from spallm_kernels import lut_linear
from spallm_kernels.cpu import linear, portable, vector_units, vectorized
from spallm_kernels.cpu.vector_units import (
    AMX,
    AVX512,
    CHOICE,
    PORTABLE,
    available_units,
    host_unit,
    unit_of,
)

AVX2 = unit_of("avx2").features


@pytest.fixture
def choose(monkeypatch):
    """Return a function that sets `SPALLM_CPU`; None deletes it."""

    def set_choice(name):
        monkeypatch.delenv(CHOICE, raising=False)
        if name is not None:
            monkeypatch.setenv(CHOICE, name)
        host_unit.cache_clear()

    yield set_choice
    host_unit.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """The modules whose `decode` ran, in turn."""
    names = []

    def spy(module):
        original = module.decode

        def decode(*arguments):
            names.append(module.__name__.rpartition(".")[2])
            return original(*arguments)

        monkeypatch.setattr(module, "decode", decode)

    spy(portable)
    spy(vectorized)
    return names


def pretend(monkeypatch, machine, *features):
    monkeypatch.setattr(vector_units.platform, "machine", lambda: machine)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(features, True))


def product(sketch, dtype=torch.float32):
    columns = sketch.codes.shape[1]
    x, table = torch.ones(1, columns, dtype=dtype), sketch.table.to(dtype)
    return lut_linear(x, sketch.index_map, table, hash_seed=sketch.hash_seed, path="decode")


def test_every_unit_of_this_machine_can_be_chosen(unit, ran):
    sketch = random_sketch(4, 1, columns=47)
    assert host_unit().name == unit
    assert linear.path_name(sketch.table.float(), 47) == unit
    product(sketch)
    assert ran == ["vectorized"]


def test_portable_loops_can_be_chosen(choose, ran):
    choose(PORTABLE)
    sketch = random_sketch(4, 1, columns=47)
    assert host_unit() is None
    assert linear.path_name(sketch.table.float(), 47) == PORTABLE
    product(sketch)
    assert ran == ["portable"]


def test_without_a_choice_the_first_unit_is_used(choose):
    choose(None)
    assert host_unit() is next(iter(available_units().values()), None)


@pytest.mark.parametrize(
    ("machine", "features", "names"),
    [
        ("x86_64", AMX.features + AVX2, ["amx", "avx512", "avx2"]),
        ("x86_64", AVX512.features + AVX2, ["avx512", "avx2"]),
        ("AMD64", AVX2, ["avx2"]),
        ("x86_64", AVX2[:-1], []),
        ("x86_64", ("neon",), []),
        ("aarch64", ("neon",), ["neon"]),
        ("arm64", (), ["neon"]),  # LLVM does not always name it
        ("riscv64", ("neon",), []),
    ],
)
def test_units_by_machine(choose, monkeypatch, machine, features, names):
    pretend(monkeypatch, machine, *features)
    monkeypatch.setattr(vector_units, "permit_matrix", lambda: True)
    choose(None)
    assert list(available_units()) == names
    assert (host_unit().name if host_unit() else None) == next(iter(names), None)


def test_amx_needs_the_permission_of_the_system(choose, monkeypatch):
    pretend(monkeypatch, "x86_64", *AMX.features)
    monkeypatch.setattr(vector_units, "permit_matrix", lambda: False)
    choose(None)
    assert list(available_units()) == ["avx512"]


def test_units_with_the_same_vector_instructions_share_compiled_code():
    assert AMX.key == AVX512.key
    assert unit_of(AMX.key) is AVX512


@pytest.mark.parametrize("name", ["amx", "avx512", "AVX2", "sse", ""])
def test_a_unit_that_this_machine_lacks_is_refused(choose, monkeypatch, name):
    pretend(monkeypatch, "x86_64", *AVX2)
    choose(name)
    message = f"SPALLM_CPU='{name}' cannot be used; on this machine, accepted are avx2, portable"
    sketch = random_sketch(4, 1, columns=47)
    for call in (host_unit, lambda: product(sketch)):
        for _ in range(2):  # the error is not cached
            with pytest.raises(ValueError, match=f"^{message}$"):
                call()


def test_machines_without_vector_instructions_use_portable_loops(choose, monkeypatch, ran):
    pretend(monkeypatch, "riscv64")
    choose(None)
    product(random_sketch(4, 1, columns=47))
    assert ran == ["portable"]


@pytest.mark.parametrize(
    ("bits", "groups", "columns", "dtype", "vectorizes"),
    [
        (1, 1, 48, torch.float32, False),
        (2, 1, 48, torch.float32, True),
        (3, 1, 48, torch.bfloat16, True),
        (4, 1, 48, torch.float16, True),
        (5, 1, 48, torch.float32, False),
        (8, 1, 48, torch.float32, False),
        (4, 1, 48, torch.float64, False),
        (4, 1, 47, torch.float32, True),
        (4, 5, 45, torch.float32, False),  # a group is 4.5 bytes
        (3, 3, 72, torch.float32, True),  # 9 bytes
        (3, 2, 24, torch.float32, False),  # 4.5 bytes
        (2, 12, 48, torch.float32, True),  # 1 byte
        (2, 16, 32, torch.float32, False),  # half a byte
    ],
)
def test_the_path_by_kind_of_sketch(unit, ran, bits, groups, columns, dtype, vectorizes):
    sketch = random_sketch(bits, groups, columns=columns)
    table = sketch.table.to(dtype)
    assert linear.path_name(table, columns) == (unit if vectorizes else PORTABLE)
    assert linear.path_name(table, columns, hash_seed=0) == (
        unit if bits in (2, 3, 4) and dtype != torch.float64 else PORTABLE
    )
    linear.decode(torch.ones(1, columns), sketch.index_map, table)
    assert ran == ["vectorized" if vectorizes else "portable"]
