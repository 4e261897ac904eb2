"""The embedded checkpoint's tokenizer: byte-level BPE with a chat template, built from a word list.

Nothing is trained, so the files are the same on every machine and with every version of `tokenizers`.
"""

from __future__ import annotations

import json
from pathlib import Path

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>")  # ids 0..5
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

# Every turn is closed with EOS, so a model that ends its turn ends the completion.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Each becomes one token, with the space before it.
WORDS = """
the of and to in is that it for on with as was at by be this are from or an have not but they which one you
all were her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me
even most made after also did many off before must well back through years where much your way down should
because long each just state those people how too little good world make very year still see own work get here
between both life being under day same another know might great old while last since against right use
"""


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the tokens in the order of their ids and the merges in the order of their rank."""
    alphabet = _byte_alphabet()
    tokens = [*SPECIAL_TOKENS, *alphabet]
    merges: dict[tuple[str, str], None] = {}  # a dict for its order
    space = alphabet[ord(" ")]
    for word in WORDS.split():
        spaced = space + word
        for end in range(1, len(spaced)):
            merges[spaced[:end], spaced[end]] = None
    tokens += [left + right for left, right in merges]
    return tokens, list(merges)


def readable_tokens() -> list[bool]:
    """For each token id: whether it reads well in an answer (a whole word, a mark of punctuation, the end)."""
    tokens, _ = vocabulary()
    space = _byte_alphabet()[ord(" ")]
    readable = {EOS, ".", ",", ";", "!", "?", *(space + word for word in WORDS.split())}
    return [token in readable for token in tokens]


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as Hugging Face and vLLM read them, into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_alphabet() -> list[str]:
    """Byte-level BPE spells each byte as one visible character: itself if it has a glyph, else 256 and up."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, substitute = [], 256
    for byte in range(256):
        if byte in visible:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(substitute))
            substitute += 1
    return alphabet
