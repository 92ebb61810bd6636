"""Recipes: what files mean, and every refusal in one line."""

import os

import pytest

from helpers.documented import ROOT
from spallm_convert import OptionError, Recipe, Rule

TOML = """
["*.mlp.*"]          # general entries first
bits = 3
groups = "auto"

["*.down_proj"]
groups = 2

["model.layers.0.*"]
dense = true
"""
JSON = """{
    "*.mlp.*": {"bits": 3, "groups": "auto"},
    "*.down_proj": {"groups": 2},
    "model.layers.0.*": {"dense": true}
}"""
RULES = (
    Rule(pattern="*.mlp.*", bits=3, groups="auto"),
    Rule(pattern="*.down_proj", groups=2),
    Rule(pattern="model.layers.0.*", dense=True),
)


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.json", JSON), ("A.JSON", JSON)])
def test_files_of_both_kinds(write, name, text):
    recipe = Recipe.read(write(name, text))
    assert recipe == Recipe(RULES)
    assert hash(recipe) == hash(Recipe(list(RULES)))
    assert recipe.to_json() == [
        {"pattern": "*.mlp.*", "bits": 3, "groups": "auto"},
        {"pattern": "*.down_proj", "groups": 2},
        {"pattern": "model.layers.0.*", "dense": True},
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no entries"),
        ("bits = 3", "entry 'bits': found 3; an entry is a pattern with bits, groups or dense"),
        ("['*.a']", "entry '*.a': it says nothing"),
        ("['*.a']\nbits = 5", "entry '*.a': bits must be 2, 3 or 4, found 5"),
        ("['*.a']\nbits = true", "bits must be 2, 3 or 4, found True"),
        ("['*.a']\nbits = 3.0", "bits must be 2, 3 or 4, found 3.0"),
        ("['*.a']\ngroups = 0", "groups must be 'auto' or at least 1, found 0"),
        ("['*.a']\ngroups = 'many'", "groups must be 'auto' or at least 1, found 'many'"),
        ("['*.a']\ndense = 1", "dense must be true or false, found 1"),
        ("['*.a']\ndense = true\nbits = 3", "dense layers have no bits or groups"),
        ("['*.a']\nbit = 3", "entry '*.a': unknown key 'bit', accepted are bits, groups, dense"),
        ("[mlp.down_proj]\nbits = 3", 'write the pattern in quotes, as in ["*.down_proj"]'),
        ("['']\nbits = 3", "a pattern must be a text, found ''"),
        ("['*.a']\nbits = 9\n['*.b']\nbits = 8", "found 9; recipe, entry '*.b': bits must be"),
        ("['*.a'", "recipe.toml: not valid TOML ("),
        (b"\xff\xfe", "recipe.toml: not valid TOML ("),
        ("['*.a']\nbits = 3\n['*.a']\nbits = 4", "not valid TOML ("),
        ("#" * (1 << 20) + "\n", "larger than 1,048,576 bytes"),
    ],
)
def test_bad_files_are_refused_in_one_line(write, text, said):
    with pytest.raises(OptionError) as caught:
        Recipe.read(write("recipe.toml", text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipe")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected a table of patterns, found []"),
        ("{", "not valid JSON"),
        ('{"*.a": {"bits": 3}, "*.a": {"bits": 4}}', "repeated keys in JSON: '*.a'"),
        ("[" * 100_000, "recipe.json: "),
    ],
)
def test_bad_json_is_refused(write, text, said):
    with pytest.raises(OptionError) as caught:
        Recipe.read(write("recipe.json", text))
    assert said in str(caught.value)


def test_files_that_cannot_be_read(write, tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    for path, said in (
        (tmp_path / "none.toml", "cannot be read"),
        (tmp_path / "pipe.toml", "a pipe, expected a regular file"),
        (write("recipe.yaml", "a: 1"), "expected a file that ends in .toml or .json"),
    ):
        with pytest.raises(OptionError, match=said):
            Recipe.read(path)


@pytest.mark.parametrize("rules", [None, (), ("*.a",), RULES + RULES[:1]])
def test_rules_are_checked_in_python_too(rules):
    with pytest.raises(OptionError, match="recipe: "):
        Recipe(rules)


def test_the_example_is_the_one_in_the_documentation():
    example = Recipe.read(ROOT / "examples/recipe.toml")
    page = (ROOT / "docs/howto/recipes.md").read_text(encoding="utf-8")
    text = (ROOT / "examples/recipe.toml").read_text(encoding="utf-8")
    assert text.partition("\n\n")[2] in page
    assert [rule.pattern for rule in example.rules][-1] == "model.layers.0.self_attn.*"
