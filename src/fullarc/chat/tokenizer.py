"""Text to token ids and back: a byte-level BPE whose special ids no text can forge.

Invariants: `decode(encode(text)) == text` for any text (bytes are the alphabet, nothing is normalised), and
`encode` yields ordinary ids only; a special id exists in a sequence because a renderer put it there or a model
sampled it, never because someone wrote its name (spec 3.3). Digits are single tokens; runs of Han characters are
cut every four, which bounds the time that training takes on Chinese text.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from fullarc.chat.special import EOS, PAD, SPECIAL_TOKENS, STOP_TOKENS, STRUCTURE_TOKENS
from fullarc.chat.template import CHAT_TEMPLATE
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_write

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|\p{Han}{1,4}"
    r"| ?[\p{L}\p{M}&&[^\p{Han}]]+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
LONG = 2**16  # characters


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte in tokenizer.json."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


def _ids(tok: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text; of a long one by the call that lets other threads run meanwhile."""
    text = _encodable(text)
    if len(text) > LONG:
        return list(tok.encode_batch_fast([text], add_special_tokens=False)[0].ids)
    return list(tok.encode(text, add_special_tokens=False).ids)


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which have no UTF-8 form (a model's JSON may contain them)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """Byte-level BPE plus GLM's special tokens. Build one with `train` or `load`.

    Attributes:
        vocab_size: number of ids, special ones included.
        stop_ids: ids at which generation ends: endoftext, user, observation.
        special_ids: every special id.
    """

    def __init__(self, full: tokenizers.Tokenizer) -> None:
        self._full = full
        plain = json.loads(full.to_str()) | {"added_tokens": []}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self._ids: dict[str, int] = {}
        for name in SPECIAL_TOKENS:
            token_id = full.token_to_id(name)
            if token_id is None:
                raise FullarcError(f"The tokenizer has no token {name}.", "Use one that fullarc trained.")
            self._ids[name] = token_id
        self.vocab_size: int = full.get_vocab_size(with_added_tokens=True)
        self.special_ids: frozenset[int] = frozenset(self._ids.values())
        self.stop_ids: tuple[int, ...] = tuple(self._ids[name] for name in STOP_TOKENS)
        self._names = {token_id: name for name, token_id in self._ids.items()}
        table = _byte_of_char()
        self._bytes = [b""] * self.vocab_size
        for token, token_id in self._plain.get_vocab().items():
            self._bytes[token_id] = bytes(table[char] for char in token)
        for name, token_id in self._ids.items():
            self._bytes[token_id] = name.encode()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts`; a small corpus may yield fewer than `vocab_size` ids.

        Raises:
            FullarcError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
        """
        if vocab_size < MIN_VOCAB:
            raise FullarcError(f"vocab_size = {vocab_size} is too small.", f"Use at least {MIN_VOCAB}.")
        full = tokenizers.Tokenizer(models.BPE())
        full.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        full.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        full.train_from_iterator((_encodable(text) for text in texts), trainer)
        full.add_tokens(
            [AddedToken(n, special=n not in STRUCTURE_TOKENS, normalized=False) for n in SPECIAL_TOKENS]
        )
        return cls(full)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which Hugging Face reads."""
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "pad_token": PAD,
            "additional_special_tokens": [n for n in SPECIAL_TOKENS if n not in STRUCTURE_TOKENS],
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        }
        atomic_write(folder / "tokenizer.json", self._full.to_str(pretty=True))
        atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=1))
        atomic_write(folder / "chat_template.jinja", CHAT_TEMPLATE)

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Read a folder (a checkpoint, or what `save` wrote) that holds tokenizer.json.

        Raises:
            FullarcError: the file is absent, or is not a byte-level tokenizer with GLM's special tokens.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FullarcError(f"{path} does not exist.", "Point to a checkpoint or tokenizer folder.")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text()))
        except FullarcError:
            raise
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a malformed file
            raise FullarcError(f"{path} is not a byte-level tokenizer file ({error}).") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; names of special tokens in it are text like any other."""
        return _ids(self._plain, text)

    def encode_raw(self, text: str) -> list[int]:
        """Ids of text in which the names of special tokens mean the tokens, as in a rendered chat template."""
        return _ids(self._full, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(t) for t in texts]`, faster."""
        encodings = self._plain.encode_batch_fast([_encodable(t) for t in texts], add_special_tokens=False)
        return [list(e.ids) for e in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text and, for each, the half-open range of characters that it covers."""
        encoding = self._plain.encode(_encodable(text), add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; broken UTF-8 becomes U+FFFD and ids outside the vocabulary nothing. Never raises."""
        skipped = self.special_ids if skip_special else frozenset()
        known = (i for i in ids if 0 <= i < self.vocab_size and i not in skipped)
        return b"".join(self._bytes[i] for i in known).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for (a special token: its name); none for a model's further ids."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def id(self, name: str) -> int:
        """Id of a special token by its name; KeyError for anything else."""
        return self._ids[name]

    def name(self, token_id: int) -> str | None:
        """Name of a special token by its id; None for ordinary ids."""
        return self._names.get(token_id)
