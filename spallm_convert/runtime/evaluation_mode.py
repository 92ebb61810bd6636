"""Keep modules in evaluation mode whose training code reads the weight of a sketched layer.

Mixers of state-space models pass the weight of their last projection to a fused kernel in training.
In evaluation mode they call the projection, with the same result and the same gradients.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from spallm_convert.source.weight_reads import read_in_training

from .linear import SketchedLinear


def keep_in_evaluation(model: nn.Module) -> None:
    """Keep the modules in evaluation mode that read the weight of a sketched layer in training.

    `model.train()` then changes the modules below them only.

    Args:
        model: The model, whose layers are sketched.
    """
    sketched = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, SketchedLinear)
    ]
    for path in read_in_training(model, sketched):
        module = model.get_submodule(path)
        module.training = False
        vars(module)["train"] = partial(_train_below, module)


def _train_below(module: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of `module.train`: set the mode of everything below the module."""
    for child in module.children():
        child.train(mode)
    return module
