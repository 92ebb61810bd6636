"""Calls of a block: split into arguments and hidden states, repeated, and compared."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spallm_convert import CalibrationError
from spallm_convert.calibration.blocks.calls import Call

HIDDEN = torch.arange(6.0).reshape(1, 2, 3)


@pytest.mark.parametrize("first", [True, False])
def test_a_call_is_repeated_with_other_hidden_states(first):
    args, kwargs = ((HIDDEN, "mask"), {}) if first else ((), {"hidden_states": HIDDEN})
    call, hidden = Call.taken_apart(args, kwargs | {"position": 3})
    assert hidden is HIDDEN
    seen = call.repeat(lambda *args, **kwargs: (args, kwargs), HIDDEN + 1)
    if first:
        (found, mask), rest = seen
        assert mask == "mask"
    else:
        rest = dict(seen[1])
        found = rest.pop("hidden_states")
    assert torch.equal(found, HIDDEN + 1)
    assert rest == {"position": 3}


def test_what_blocks_leave_in_containers_is_not_there_for_others():
    shared = {"kept": 1}
    call, _ = Call.taken_apart((HIDDEN, [2]), {"shared": shared})

    def block(hidden, listed, shared):
        listed.append(3)
        shared["left"] = hidden
        return listed, shared

    for _ in range(2):
        listed, found = call.repeat(block, HIDDEN)
        assert listed == [2, 3]
        assert found == {"kept": 1, "left": HIDDEN}
    assert shared == {"kept": 1}


def test_a_call_without_hidden_states_is_refused():
    with pytest.raises(CalibrationError, match="arguments mask, position, expected hidden_states"):
        Call.taken_apart((), {"mask": None, "position": 1})


def values():
    return [
        None,
        1,
        2,
        "eager",
        (HIDDEN, None),
        (HIDDEN, HIDDEN),
        (HIDDEN,),
        [HIDDEN],
        {"a": HIDDEN},
        {"b": HIDDEN},
        HIDDEN + 1,
        SimpleNamespace(lengths=HIDDEN),
        SimpleNamespace(lengths=HIDDEN + 1),
        np.zeros(2),
        np.ones(2),
        {1},
        {2},
        slice(0, 1),
        slice(0, 2),
    ]


def test_calls_are_the_same_if_all_that_they_hold_is():
    for i, found in enumerate(values()):
        for j, expected in enumerate(values()):
            calls = [Call((value,), {}, True) for value in (found, expected)]
            assert calls[0].same_as(calls[1]) == (i == j)
