"""Tokenizers that are not there: transformers makes empty ones, which must not measure anything."""

import pytest
from transformers import AutoConfig

from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import SpallmError
from spallm_convert.source.locate import Source
from spallm_convert.source.tokenizer import load_tokenizer


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "llama", "qwen2", "t5"])
def test_a_folder_without_a_tokenizer_is_refused(architecture, tmp_path):
    AutoConfig.for_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(SpallmError, match=r"a model: its tokenizer cannot be loaded \(no "):
        load_tokenizer(Source("a model", tmp_path, None))


def test_a_small_vocabulary_is_one(tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(Source("a model", tmp_path, None))("ab")["input_ids"]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "merges.txt", "spiece.model"])
def test_a_pointer_of_git_lfs_is_no_vocabulary(name, tmp_path):
    """The three lines of a pointer are a vocabulary of BERT, or merges of GPT-2."""
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SpallmError, match=f"{name}: a git-lfs pointer .*`git lfs pull`"):
        load_tokenizer(Source("a model", tmp_path, None))
