"""Tokenizers of given words, as transformers 4 and 5 each make them: the same tokens of either.

Version 5 makes a tokenizer of its words. Version 4 makes one of files, or of what the `tokenizers`
library has made; that is set here as version 5 sets it.
"""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

FAST: Any = transformers  # with the names of version 4, which a checker of version 5 lacks
OLDER = int(transformers.__version__.partition(".")[0]) < 5


def t5(pieces: list[tuple[str, float]]) -> Any:
    """T5's: pieces with their log-probabilities, "<pad>", "</s>" and "<unk>" first."""
    if not OLDER:
        return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    marked = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**marked)]
    )
    made.decoder = decoders.Metaspace(**marked)
    made.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return FAST.T5TokenizerFast(tokenizer_object=made, extra_ids=0)


def gemma(vocab: dict[str, int]) -> Any:
    """Gemma's, which begins with "<bos>": single letters and bytes, of which none are joined."""
    if not OLDER:
        return transformers.GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return FAST.GemmaTokenizerFast(tokenizer_object=made, add_bos_token=True, mask_token="<mask>")


def qwen(vocab: dict[str, int]) -> Any:
    """Qwen's: single bytes, of which none are joined."""
    if not OLDER:
        return transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    made = Tokenizer(models.BPE(vocab, []))
    made.normalizer = normalizers.NFC()
    # where it cuts a text into words makes no difference to single bytes
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return FAST.Qwen2TokenizerFast(tokenizer_object=made)
