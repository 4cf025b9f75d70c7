"""Models of well-known shapes with random weights, for timing on machines without a network.

``python -m tests.gpu.random_models bge-base FOLDER`` writes a SentenceTransformer folder; then
``python -m pipeline.encoder bench --model FOLDER --baseline --json``.
"""

import itertools
import string
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

VOCABULARY = 30522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPES = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bge-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bge-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def write_model(shape: str, folder: Path) -> Path:
    """A BERT of a shape in SHAPES with seeded random weights, mean pooling, 512 tokens; returns ``folder``."""
    torch.manual_seed(0)
    plain = folder.with_name(folder.name + "-plain")
    BertModel(BertConfig(vocab_size=VOCABULARY, **SHAPES[shape])).save_pretrained(plain)
    tokenizer().save_pretrained(plain)
    first = Transformer(str(plain), max_seq_length=512)
    SentenceTransformer(modules=[first, Pooling(SHAPES[shape]["hidden_size"]), Normalize()], device="cpu").save(str(folder))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *itertools.islice(words, VOCABULARY - len(SPECIAL))])}
    made = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    frame = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=frame)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **names)


if __name__ == "__main__":
    print(write_model(sys.argv[1], Path(sys.argv[2])))
