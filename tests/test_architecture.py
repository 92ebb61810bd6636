"""docs/architecture.md names files that exist, and its walks go down through the rooms."""

import re

import pytest

from test_imports import FLOORS, HOMES, ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
WALKS = PAGE.partition("## Three walks")[2].partition("\n## ")[0].split("\n\n`")[1:]
#: Names of rooms and files of the ground floor, by their floor.
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def steps(walk):
    """The steps of a walk: for each the package, "" for the converter's own, and the files."""
    for step in re.split(r"\n- ", walk)[1:]:
        package, colon, names = step.partition(": ")
        yield (package, names) if colon else ("", step)


def files(names):
    return re.findall(r"[\w/]+\.py", names)


def test_there_are_three_walks():
    assert len(WALKS) == 3
    assert all(sum(len(files(names)) for _, names in steps(walk)) > 10 for walk in WALKS)


@pytest.mark.parametrize("walk", WALKS, ids=["convert", "calibrate and heal", "load and train"])
def test_a_walk_names_files_and_goes_down(walk):
    floor = 0
    for package, names in steps(walk):
        for name in files(names):
            home = package or "spallm_convert"
            assert (HOMES[home] / home / name).is_file(), name
            if package:
                floor = len(FLOORS)
                continue
            found = FLOOR_OF[name.partition("/")[0].removesuffix(".py")]
            assert found >= floor, f"{name} is above the step before"
            floor = found


def test_every_room_is_described():
    rooms = {room for names in FLOORS for room in names}
    drawing = PAGE.partition("## Rooms")[2].partition("\n## ")[0]
    assert {room for room in rooms if not re.search(rf"\b{room}\b", drawing)} == set()
