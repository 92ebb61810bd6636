"""Kernels in plain torch that stand in for those of a GPU, right or wrong."""

from types import SimpleNamespace

import torch

from spallm_kernels.reference import linear as reference


def kernels(**replaced):
    """Right kernels in plain torch, except for those that are replaced."""

    def decode(x, index_map, table, bias=None, *, hash_seed=None):
        weight = reference.dequantize(index_map, table, x.shape[1], hash_seed=hash_seed)
        return torch.nn.functional.linear(x, weight, bias)

    right = {
        "can_decode": lambda x, table: True,
        "decode": decode,
        "dequantize": reference.dequantize,
        "table_grad": reference.table_grad,
    }
    return SimpleNamespace(**right | replaced)


def uncompiled(*arguments, **options):
    raise RuntimeError("ptxas fatal\n  : unknown instruction 'prmt'")


def wrong(*arguments, **options):
    return 1.02 * kernels().decode(*arguments, **options)


class Backends(dict):
    """A function that returns planted backends, and counts how often each was loaded and ran."""

    def __init__(self, **planted):
        super().__init__(planted)
        self.ran = []

    def __call__(self, name):
        def recorded(*arguments, **options):
            self.ran.append(name)
            return self[name].dequantize(*arguments, **options)

        return SimpleNamespace(**vars(self[name]) | {"dequantize": recorded})

    __hash__ = object.__hash__
