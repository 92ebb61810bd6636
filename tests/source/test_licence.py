"""The licence in a model card: what is read of it, and cards made to do harm."""

import json
import tracemalloc

import pytest

from spallm_convert import convert
from spallm_convert.source.licence import read_licence


@pytest.fixture
def licence_in(tmp_path):
    def read(card):
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
        return read_licence(tmp_path)

    return read


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "tags:\n- a\nlicense: other\nlicense_name: my-licence\nlicense_link: https://x/y#z",
            {"license": "other", "license_name": "my-licence", "license_link": "https://x/y#z"},
        ),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license:\n- mit\n- 'gpl'", {"license": ["mit", "gpl"]}),
        ("license: 2024-01-01", {"license": "2024-01-01"}),
        ("license: !!binary aGVsbG8=", {"license": "aGVsbG8="}),
        ("license: yes", {"license": "yes"}),
        ("model-index:\n- a: {b: [1, {c: d}]}\nlicense: mit", {"license": "mit"}),
        ("base: &b org/base\nother: *b\nlicense: mit", {"license": "mit"}),
        ("? [a, b]\n: c\nlicense: mit", {"license": "mit"}),
        ("license:", None),
        ("license: {a: b}", None),
        ("license:\n  a: b\n  license: c", None),
        ("license: mit\nother: [", {"license": "mit"}),
        ("text: |\n  license: a\n\n  b\n'license' : 'mit'\nc: d", {"license": "mit"}),
        ("license: [\n  mit,\n  b\n]\nc: d", {"license": ["mit", "b"]}),
        ("results:\n" + "- a: b\n" * 20_000 + "license: mit", {"license": "mit"}),
        ("license: [mit, [a]]", None),
        ("license: &a [*a]", None),
        ("license: !!set {mit}", None),
        ("a: &a mit\nlicense: *a", None),
        (f"license: {'x' * 501}", None),
        (f"license: [{'x, ' * 21}]", None),
        (r'license: "half \ud800"', None),
        (r'license: "beyond \U00110000"', None),
        ("license: [", None),
        ("- license", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_only_texts_are_read(licence_in, metadata, licence):
    for end in ("\n", "\r\n"):
        card = f"---\n{metadata}\n---\n# A model\nlicense: not this\n".replace("\n", end)
        assert licence_in(card) == licence


def test_a_card_without_metadata_has_no_licence(licence_in, tmp_path):
    assert read_licence(tmp_path) is None
    assert licence_in("license: mit\n") is None
    assert licence_in("---\nlicense: mit\n") is None
    assert licence_in(b"\xef\xbb\xbf---\nlicense: mit\n---") == {"license": "mit"}
    assert licence_in(b"---\nauthor: \xff\nlicense: mit\n---\n") == {"license": "mit"}


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
HOSTILE = {
    "aliases": f"{LAUGHS}license: *a29",
    "brackets": "license: " + "[" * 60_000,
    "lines of brackets": "license:\n" + " [\n" * 20_000,
    "indents": "".join(f"{' ' * i}a:\n" for i in range(340)),
    "many": "license:\n" + "- a\n" * 15_000,
    "many keys": "license:\n" * 100_000,
    "empty lines": "license:" + "\n" * 900_000,
    "long": "a: " + "x" * 2_000_000 + "\nlicense: mit",
}


@pytest.mark.parametrize("metadata", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_card_is_ignored_in_little_memory(licence_in, metadata):
    tracemalloc.start()
    assert licence_in(f"---\n{metadata}\n---\n") is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_a_conversion_keeps_the_licence_and_survives_any_card(tiny_llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_llama.folder.iterdir():
        (source / path.name).symlink_to(path) if path.suffix == ".safetensors" else (
            source / path.name
        ).write_bytes(path.read_bytes())
    for card, licence in {
        "license: [mit, gpl]\ncreated: 2024-01-01": {"license": ["mit", "gpl"]},
        "license: &a [*a]": None,
    }.items():
        (source / "README.md").write_text(f"---\n{card}\n---\n")
        report = convert(source, tmp_path / "out", overwrite=True)
        assert report.source["license"] == licence
        written = (tmp_path / "out/README.md").read_text()
        assert (f"license: {json.dumps(['mit', 'gpl'])}\n" in written) == (licence is not None)
