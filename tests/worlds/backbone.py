"""A language model of random weights for tests, small enough to train within a second."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_ID = 1
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"eos_token_id": END_ID, "initializer_range": 0.2}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that every text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unknown, end = "<unk>", "<eos>"
    vocabulary = {unknown: 0, end: END_ID} | {letter: number + 2 for number, letter in enumerate(alphabet)}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=unknown, eos_token=end, pad_token=end)


def tiny_llama(vocabulary: int, num_layers: int, **changed: Any) -> LlamaConfig:
    """Architecture of a Llama of width 32; its input and output embeddings are one unless changed."""
    sizes = {"vocab_size": vocabulary, "num_hidden_layers": num_layers}
    return LlamaConfig(**TINY | sizes | {"tie_word_embeddings": True} | changed)


def write_backbone(folder: Path, num_layers: int) -> Path:
    """Write a Llama of random weights and its tokenizer as transformers does."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(tiny_llama(len(tokenizer), num_layers)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
