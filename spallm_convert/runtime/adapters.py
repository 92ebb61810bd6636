"""Let PEFT put LoRA on sketched layers, and refuse what would read their packed codes as weights.

PEFT takes a sketched layer for any other linear layer. Plain LoRA only adds to its output. Merging,
DoRA, PiSSA and most other methods read or write `weight`, which holds packed codes. So importing
this module wraps two methods that all tuners of PEFT inherit, to ask here for every sketched layer
that is about to get an adapter, and before adapters are merged. Other layers are not concerned.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from spallm_convert.errors import OptionError

from .embedding import SketchedEmbedding
from .linear import SketchedLinear
from .sketch import is_sketched

#: Initial values of LoRA that do not depend on the weight. EVA reads the inputs of layers.
_INITIAL_VALUES = (True, False, "gaussian", "eva")
_ADVICE = "use plain LoRA, train the tables instead, or call model.dequantize() first"


def _refusal(what: str) -> OptionError:
    """Return the error for what would read or write the weight of a sketched layer."""
    return OptionError(
        f"PEFT: {what} needs a dense weight, but SketchedLinear has an index map and tables: "
        f"{_ADVICE}"
    )


def _is_sketched(module: Any) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return is_sketched(base)


class SketchedLoraLinear(Linear):  # type: ignore[misc]  # without PEFT, its class is Any
    """Add LoRA to the output of a sketched layer."""

    def resolve_lora_variant(self, **options: Any) -> Any:
        variant = super().resolve_lora_variant(**options)
        if variant is not None:
            raise _refusal(f"this kind of LoRA ({type(variant).__name__})")
        return None

    def merge(self, *args: Any, **options: Any) -> None:
        raise _refusal("merging")


def _check(config: Any, parameter_name: str | None) -> None:
    """Refuse what a config asks for on a sketched layer, unless it is LoRA beside its weight."""
    method = getattr(config.peft_type, "value", config.peft_type)
    if method != "LORA":
        raise _refusal(f"the method {method}")
    if parameter_name is not None:
        raise _refusal(f"target_parameters with {parameter_name!r}")
    initial = config.init_lora_weights
    if initial not in _INITIAL_VALUES:
        raise _refusal(f"init_lora_weights={initial!r}")


def _asking(inject_adapter: Any) -> Any:
    """Wrap the method that adds an adapter to a model: check each sketched layer on the way."""

    @functools.wraps(inject_adapter)
    def inject(self: Any, *args: Any, **options: Any) -> Any:
        create = self._create_and_replace

        def checked(config: Any, name: str, target: Any, *rest: Any, **more: Any) -> Any:
            if isinstance(target, SketchedEmbedding):
                raise OptionError(f"PEFT: {name} is a sketched embedding: {_ADVICE}")
            if _is_sketched(target):
                _check(config, more.get("parameter_name"))
                config._register_custom_module({SketchedLinear: SketchedLoraLinear})
            return create(config, name, target, *rest, **more)

        self._create_and_replace = checked
        try:
            return inject_adapter(self, *args, **options)
        finally:
            del self._create_and_replace

    return inject


def _refusing(check_merge_allowed: Any) -> Any:
    """Wrap the check before merging, so that nothing is merged if a layer cannot be."""

    @functools.wraps(check_merge_allowed)
    def check(self: Any) -> None:
        check_merge_allowed(self)
        modules = self.model.modules()
        if any(isinstance(m, BaseTunerLayer) and _is_sketched(m) for m in modules):
            raise _refusal("merging")

    return check


BaseTuner.inject_adapter = _asking(BaseTuner.inject_adapter)
BaseTuner._check_merge_allowed = _refusing(BaseTuner._check_merge_allowed)
