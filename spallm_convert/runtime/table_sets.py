"""Hold several sets of tables for one model, one of them active.

The set "base" holds the values that the model was loaded with. Activating a set exchanges the
storage of parameters: it takes milliseconds, and the parameters that optimizers and hooks know stay
valid. Sharded parameters keep their storage and get copies of the values. Dtypes never change when
a set is activated, because optimizers keep moments in the dtype of the parameter.

A set holds values only for the parameters that it replaces, and shares all others with the base. A
shared parameter may be unfrozen and trained while a set is active. Its value in the base must then
be copied before the optimizer overwrites it, so each set of a model is told before every step.

An affine set has shifts and scales in place of tables (see `affine.py`), and shares the base's
tables. Every set with tables of its own has shifts of 0 and scales of 1, if the model has any.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from spallm_convert.errors import OptionError

from .parameters import Pair, Place, replaceable, sketched_pairs
from .sharding import is_sharded

BASE = "base"

#: The name under which a model keeps its sets, which are copied and pickled with the model.
_ATTRIBUTE = "_sketch_table_sets"


class TableSets:
    """Hold every set of a model, by name and parameter.

    The model's parameters share storage with the active set. "base" has a value for every parameter
    that any set replaces.

    Attributes:
        active: Name of the active set.
    """

    def __init__(self) -> None:
        self.active = BASE
        self._stored: dict[str, dict[str, Tensor]] = {BASE: {}}
        self._places: dict[str, Place] = {}
        self._pairs: list[Pair] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Protect the base of a model that was copied or unpickled, too."""
        self.__dict__.update(state)
        if len(self._stored) > 1:
            _watch(self)

    @classmethod
    def of(cls, model: nn.Module) -> TableSets:
        """Return the sets of a model from `sketched_model`."""
        sets: TableSets = model.__dict__.setdefault(_ATTRIBUTE, cls())
        sets._places = replaceable(model)  # modules may have been added or replaced
        sets._pairs = sketched_pairs(model)
        return sets

    @property
    def names(self) -> list[str]:
        """Return the names of all sets: the active one first, the others in alphabetical order."""
        return [self.active, *sorted(self._stored.keys() - {self.active})]

    @property
    def places(self) -> dict[str, Place]:
        """Return the places of all parameters that a set may replace, by name."""
        return self._places

    @property
    def pairs(self) -> list[Pair]:
        """Return the sketches of the model."""
        return self._pairs

    @property
    def carried(self) -> set[str]:
        """Return the names of the parameters that the active set replaces; none for "base"."""
        return set() if self.active == BASE else set(self._stored[self.active])

    @property
    def table_dtype(self) -> torch.dtype:
        """Return the widest dtype of the model's tables."""
        return functools.reduce(torch.promote_types, {t.dtype for t in self._tables().values()})

    def is_affine(self, name: str) -> bool:
        """Return whether a set other than "base" has no tables of its own."""
        return name != BASE and not any(pair.key in self._stored[name] for pair in self._pairs)

    @property
    def affine_names(self) -> list[str]:
        """Return the names of all affine sets, in alphabetical order."""
        return sorted(filter(self.is_affine, self._stored))

    def base_value(self, key: str) -> Tensor:
        """Return the base's value of a parameter."""
        found = self._stored[BASE].get(key)
        return self._places[key].parameter.detach() if found is None else found

    def add(self, name: str, values: dict[str, Tensor], *, activate: bool) -> None:
        """Add a set, or replace the set of this name.

        Args:
            name: Name of the set.
            values: Values for all tables, or for all shifts and scales, and for any other
                parameters, by name, on the device and in the dtype of the parameters. The set keeps
                these tensors.
            activate: Whether to make it active. A set that replaces the active one is in any case.
        """
        was_active = self.active == name
        if was_active:
            self.activate(BASE)
        for key in values:  # if the base has no value yet, no set has replaced the parameter
            self._stored[BASE].setdefault(key, _current(self._places[key].parameter))
        self._stored[name] = values
        self.complete()
        _watch(self)
        if activate or was_active:
            self.activate(name)

    def activate(self, name: str) -> None:
        """Make a set active, and drop the gradients of the parameters that it replaces."""
        leaving, base = self._stored[self.active], self._stored[BASE]
        for key in leaving:  # moving the model to a device gives it new storage
            leaving[key] = _current(self._places[key].parameter)
        for key in {key for values in self._stored.values() for key in values}:
            _replace(self._places[key].parameter, self._stored[name].get(key, base[key]))
        self.active = name
        self._choose_trainable()
        self.keep_apart()

    def complete(self) -> None:
        """Give every set with tables of its own the shifts and scales that change nothing."""
        numbers = {key: place for key, place in self._places.items() if place.is_affine}
        for name, values in self._stored.items():
            if name == BASE or self.is_affine(name):
                continue
            for key in numbers.keys() - values.keys():
                place, active = numbers[key], self.active
                kept = _current(place.parameter) if active == BASE else place.identity()
                self._stored[BASE].setdefault(key, kept)
                # If the set is active, the numbers are new, and change nothing.
                values[key] = place.parameter.detach() if active == name else place.identity()

    def shared_tables(self) -> list[nn.Parameter]:
        """Return the tables of the base if it is active and affine sets use them; else none."""
        if self.active != BASE or not self.affine_names:
            return []
        return [pair.table.parameter for pair in self._pairs]

    def check_base_trainable(self) -> None:
        """Raise OptionError if the base is active and affine sets use its tables."""
        if self.shared_tables():
            raise OptionError(
                f"training the tables of the base would change the affine sets "
                f"{', '.join(self.affine_names)}, which use them; activate another set first, or "
                f"train shifts and scales: set_trainable(model, affine=True)"
            )

    def _choose_trainable(self) -> None:
        """Let the numbers of an affine set be trained in place of tables, and the other way round.

        Training the tables of an affine set would give it a copy of all tables.
        """
        if self.active == BASE:  # as `set_trainable` says
            return
        affine = self.is_affine(self.active)
        for pair in self._pairs:
            numbers = [place.parameter for place in pair.affine.values()]
            leaving, coming = [pair.table.parameter], numbers
            if not affine:
                leaving, coming = coming, leaving
            if any(parameter.requires_grad for parameter in leaving):
                for parameter in leaving:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                for parameter in coming:
                    parameter.requires_grad_(True)

    def keep_apart(self) -> None:
        """Give the active set its own value of every parameter that may be trained.

        So training one set changes no other set. The parameter keeps its storage, which the
        optimizer or a compiled graph may hold; the base gets the copy.
        """
        if self.active == BASE:
            return
        own, base = self._stored[self.active], self._stored[BASE]
        for key in self._places.keys() - own.keys():
            parameter = self._places[key].parameter
            if parameter.requires_grad or parameter.grad is not None:
                kept = base.get(key)
                if kept is None or _share_storage(kept, parameter):
                    base[key] = parameter.detach().clone()
                own[key] = parameter.detach()

    def cast_tables(self, dtype: torch.dtype) -> None:
        """Cast the tables, shifts and scales of every set, and drop the gradients of those cast."""
        active = self._stored[self.active]
        for key, parameter in self._tables().items():
            for values in self._stored.values():
                if key in values and values is not active:
                    values[key] = values[key].to(dtype)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None
                if key in active:
                    active[key] = _current(parameter)

    def _tables(self) -> dict[str, nn.Parameter]:
        places = self._places.items()
        return {key: place.parameter for key, place in places if place.has_table_dtype}


_watched: weakref.WeakSet[TableSets] = weakref.WeakSet()


def _watch(sets: TableSets) -> None:
    _watched.add(sets)
    _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    # Hooks of parameters or modules would be lost: FSDP2 replaces parameters, copies of a model
    # have no hooks, and a compiled model would be compiled in pieces.
    before_step = torch.compiler.disable(_before_step)  # type: ignore[no-untyped-call]
    register_optimizer_step_pre_hook(before_step)


def _before_step(optimizer: Any, arguments: Any, options: Any) -> None:
    stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for sets in list(_watched):
        if any(p.grad is not None and id(p) in stepping for p in sets.shared_tables()):
            sets.check_base_trainable()
        sets.keep_apart()


def _current(parameter: nn.Parameter) -> Tensor:
    """Return the value of a parameter, to be restored later."""
    value = parameter.detach()
    return value.clone() if is_sharded(parameter) else value


def _replace(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter the storage of a value, or a copy of the value if it is sharded."""
    if is_sharded(parameter):
        with torch.no_grad():
            parameter.copy_(value)
    else:
        parameter.data = value.to(parameter.device, parameter.dtype)
    parameter.grad = None


def _share_storage(value: Tensor, parameter: nn.Parameter) -> bool:
    return not is_sharded(parameter) and value.data_ptr() == parameter.data_ptr()
