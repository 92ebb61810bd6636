"""Build a small tokenizer in memory: a token per printable ASCII character, and a few of two."""

import string

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
_MERGES = [("t", "h"), ("i", "n"), ("e", "r"), (" ", "a")]


def tiny_tokenizer(*, adds_bos=False, has_eos=True):
    """Return a PreTrainedTokenizerFast with fewer than 128 tokens."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [BOS, EOS, UNKNOWN, *CHARACTERS, *("".join(pair) for pair in _MERGES)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
        )
    special = {"bos_token": BOS, "unk_token": UNKNOWN} | ({"eos_token": EOS} if has_eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
