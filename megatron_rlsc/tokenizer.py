"""Text to token ids and back: tokenizers of Hugging Face folders and SentencePiece models, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

SENTENCEPIECE_MODEL = "tokenizer.model"
CHAT_TEMPLATE = "chat_template.jinja"
HF_FILES = ("tokenizer.json", "tokenizer_config.json")
GENERATION_CONFIG = "generation_config.json"

Message = dict[str, str]
"""`role` and `content`."""


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer. Nothing is added to a text that is not in it."""

    @property
    def vocab_size(self) -> int:
        """Its largest id + 1, special tokens included."""

    @property
    def eos_token_id(self) -> int | None:
        """Its end of sequence."""

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` may be called."""

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no beginning or end of sequence."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids. An id without a token, as a padded vocabulary has them, is no text."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the assistant speaks."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, read from its own files alone; from `tokenizer.model` where HF's are absent.

    Raises ValueError where there is none. That is looked for here: transformers makes an empty tokenizer of a folder
    that has config.json alone, and one of single characters where merges.txt is missing.
    """
    vocabularies = (("tokenizer.json",), ("vocab.json", "merges.txt"), (SENTENCEPIECE_MODEL,))
    if not any(all((folder / name).is_file() for name in names) for names in vocabularies):
        known = ", nor ".join(" with ".join(names) for names in vocabularies)
        raise ValueError(f"{folder} has no tokenizer: neither {known}. Copy it from where the weights came from")
    if (folder / SENTENCEPIECE_MODEL).is_file() and not any((folder / name).is_file() for name in HF_FILES):
        return SentencePieceTokenizer(folder)
    try:
        return HFTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # noqa: BLE001  a damaged file is a KeyError to transformers, an Exception to tokenizers
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} has no tokenizer that transformers can read ({reason}). Copy it again") from None


def stop_token_ids(tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """The one stop set: the tokenizer's end of sequence and those of generation_config.json, ascending.

    The first of them ends a response and is its last token. Raises ValueError where there is none.
    """
    stops = set(_configured_stops(folder / GENERATION_CONFIG))
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ValueError(f"{folder} names no end of sequence, in its tokenizer nor in {GENERATION_CONFIG}")
    return tuple(sorted(stops))


def _configured_stops(path: Path) -> list[int]:
    """`eos_token_id` of a generation_config.json: one, several, or none."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from None
    stops = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(stop) is not int for stop in stops):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {found!r}")
    return stops


def check_vocabulary(tokenizer: Tokenizer, stops: Sequence[int], *, vocab_size: int, folder: Path) -> None:
    """Raises ValueError where the tokenizer, or a stop, has ids that a model of `vocab_size` rows has no row for.

    Fewer ids than rows are normal: Qwen2.5's 151665 stand in 151936 rows, or 152064.
    """
    remedy = "One of the two is another model's: take config.json and the tokenizer from where the weights came from"
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has token ids up to {tokenizer.vocab_size - 1}, the model only {vocab_size} rows "
            f"for them (vocab_size of config.json). {remedy}"
        )
    outside = [str(stop) for stop in stops if not 0 <= stop < vocab_size]
    if outside:
        raise ValueError(
            f"{folder}: no response could end with stop token {', '.join(outside)} ({GENERATION_CONFIG}, or the "
            f"tokenizer's end of sequence), since the model has only {vocab_size} rows (vocab_size of config.json). "
            f"{remedy}"
        )


class HFTokenizer:
    """Any tokenizer that transformers loads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.get_vocab().get(token)

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


class SentencePieceTokenizer:
    """A SentencePiece model, and the chat template in the file beside it.

    Only what the model declares as a user-defined symbol is one token inside a text. Control symbols (`<s>`, `</s>`) in
    a text are its characters, as SentencePiece reads them, and decoding leaves them out.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a file that is no SentencePiece model."""
        path = folder / SENTENCEPIECE_MODEL
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model: {error}") from None
        ids = range(self._model.get_piece_size())
        self._control_symbols = [
            self._model.id_to_piece(token_id) for token_id in ids if self._model.is_control(token_id)
        ]
        self._template_path = folder / CHAT_TEMPLATE
        self._template = self._template_path.read_text() if self._template_path.is_file() else None

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    @property
    def eos_token_id(self) -> int | None:
        return self._model.eos_id() if self._model.eos_id() >= 0 else None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._model.decode([token_id for token_id in token_ids if token_id < self.vocab_size])

    def token_to_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)  # of the unknown token, where there is none
        return token_id if self._model.id_to_piece(token_id) == token else None

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        """Raises ValueError where the template itself writes a control symbol: the model would read its characters."""
        special = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        names = {name: self._model.id_to_piece(token_id) for name, token_id in special.items() if token_id >= 0}
        (text,), _ = render_jinja_template(
            [list(messages)], chat_template=self._template, add_generation_prompt=True, **names
        )
        asked = "".join(message["content"] for message in messages)
        written = [symbol for symbol in self._control_symbols if text.count(symbol) > asked.count(symbol)]
        if written:
            raise ValueError(
                f"{self._template_path} writes {', '.join(written)}: control symbols, which SentencePiece reads as "
                f"plain characters. Take them out of the template, or go without it by --no-apply-chat-template"
            )
        return text
