"""Free memory: what the system says, and what a container may take."""

import os

import pytest
import torch

from spallm_convert import devices
from spallm_convert.devices import free_memory

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Write the files of a container's limit in place of the system's, of either version."""
    places = [(tmp_path / f"{n}.limit", tmp_path / f"{n}.used") for n in range(2)]
    monkeypatch.setattr(devices, "_CGROUPS", tuple(places))

    def write(version, limit, used):
        for path, content in zip(places[version], (limit, used), strict=True):
            path.write_text(f"{content}\n")

    return write


@pytest.mark.skipif(not devices.Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_without_a_container_the_system_decides(group):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(CPU) <= total
    group(0, "max", 10**6)  # a container without a limit
    assert 0 < free_memory(CPU) <= total


@pytest.mark.parametrize("version", [0, 1])
def test_the_limit_of_a_container_counts(group, version):
    group(version, 5000, 2000)
    assert free_memory(CPU) == 3000
    group(version, 10**18, 0)  # how the first version says that there is none
    free = free_memory(CPU)
    assert free is not None
    assert 3000 < free <= 10**18


def test_nothing_is_known_where_the_system_does_not_tell(group, monkeypatch):
    def missing(path, *arguments, **options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(devices.Path, "read_text", missing)
    assert free_memory(CPU) is None


@pytest.mark.parametrize(("available", "free"), [(True, 123), (False, None)])
def test_a_gpu_tells_its_own(monkeypatch, available, free):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda")) == free
