"""Both kinds of tokenizer against the libraries that made them, on models trained here on a few sentences.

Not covered: Qwen2.5's own vocabulary, and tokenizers with code of their own (never loaded).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from megatron_rlsc.config import DataConfig
from megatron_rlsc.conversion.hf import copy_config_files
from megatron_rlsc.data import render
from megatron_rlsc.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    load_tokenizer,
    stop_token_ids,
)

BASE = Path(__file__).parent.parent / "checkpoints/rlsc-tiny-base"
CORPUS = [
    "What is the sum of 12 and 30? Please reason step by step, and put your final answer within \\boxed{}.",
    "The train leaves at 09:45 and covers 120 km in 1.5 hours; how fast is it?",
    "Soit f(x) = x² − 3x + 2. Où s'annule-t-elle ? 设函数 f(x) = x² − 3x + 2。",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = (  # of Qwen2.5's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TEMPLATE = (  # of Qwen2.5-Instruct, less its tools
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TEXTS = ["", " ", "  two  spaces\n\n\ttab ", "It's 3.14 ≈ π", "数学", "e\u0301", "👩‍👩‍👧", "\x00", *CORPUS[:3]]
MESSAGES = [
    [{"role": "user", "content": "1+1?"}],
    [{"role": "system", "content": "Reason."}, {"role": "user", "content": " {{ x }} \n"}],
]


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in the files that a Qwen2.5 folder has."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"chat_template": QWEN_TEMPLATE, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def piece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE with byte fallback that changes no character, and Qwen's template beside it."""
    folder = tmp_path_factory.mktemp("piece")
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=SPECIAL,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def pieces(piece_dir: Path) -> SentencePieceProcessor:
    """The upstream library on the same file."""
    return SentencePieceProcessor(model_file=str(piece_dir / "tokenizer.model"))


load_once = functools.cache(load_tokenizer)  # for tests of many examples


# Hugging Face


def test_the_folder_of_a_qwen_model_is_loaded_as_one(qwen_dir):
    assert isinstance(AutoTokenizer.from_pretrained(qwen_dir), Qwen2Tokenizer)
    assert isinstance(load_tokenizer(qwen_dir), HFTokenizer)


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>user\n1<|im_end|>", "<|endoftext|>"])
def test_hf_ids_and_text_are_those_of_the_tokenizers_library(qwen_dir, text):
    upstream, ours = tokenizers.Tokenizer.from_file(str(qwen_dir / "tokenizer.json")), load_tokenizer(qwen_dir)
    ids = upstream.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == upstream.decode(ids, skip_special_tokens=skip)


def test_hf_special_tokens_are_single_ids(qwen_dir):
    tokenizer = load_tokenizer(qwen_dir)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert tokenizer.vocab_size == 353 and ids == [350, 351, 352]  # 350 of the BPE, then these
    assert tokenizer.encode("".join(SPECIAL)) == ids
    assert tokenizer.eos_token_id == 352
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.decode([*ids, 5000], skip_special_tokens=True) == ""
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(SPECIAL)


@pytest.mark.parametrize("messages", MESSAGES)
def test_hf_chat_template_is_transformers_(qwen_dir, messages):
    upstream, ours = AutoTokenizer.from_pretrained(qwen_dir), load_tokenizer(qwen_dir)
    text = ours.apply_chat_template(messages)
    assert text == upstream.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    asked = upstream.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ours.encode(text) == asked


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_hf_round_trip(qwen_dir, text):
    """Whole, but for the canonical composition (NFC) that Qwen's tokenizer begins with."""
    tokenizer = load_once(qwen_dir)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == unicodedata.normalize("NFC", text)


# SentencePiece


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>user\n1<|im_end|>", "</s><s>"])
def test_sentencepiece_ids_and_text_are_those_of_its_library(piece_dir, pieces, text):
    ours = load_tokenizer(piece_dir)
    assert isinstance(ours, SentencePieceTokenizer)
    ids = pieces.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids, skip_special_tokens=True) == pieces.decode(ids)


def test_sentencepiece_special_tokens_are_single_ids(piece_dir, pieces):
    """<unk>, <s>, </s>, then the symbols that the model declares, then 256 bytes."""
    tokenizer = load_tokenizer(piece_dir)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    assert ids == [3, 4, 5]
    prefix = pieces.piece_to_id("▁")
    assert tokenizer.encode("".join(SPECIAL)) == [prefix, *ids]
    assert tokenizer.vocab_size == pieces.get_piece_size() == 420
    assert tokenizer.eos_token_id == tokenizer.token_to_id("</s>") == 2
    assert tokenizer.token_to_id("<unk>") == 0 and tokenizer.token_to_id("no such piece") is None


def test_sentencepiece_leaves_out_control_symbols_and_ids_without_a_piece(piece_dir):
    tokenizer = load_tokenizer(piece_dir)
    ids = tokenizer.encode("It is 3")
    assert tokenizer.decode([*ids, 2, 420, 5000], skip_special_tokens=False) == "It is 3"


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=("Cs",))))
def test_sentencepiece_round_trip(piece_dir, text):
    """Whole, as this model normalizes nothing; but for its own sign of a space."""
    tokenizer = load_once(piece_dir)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("messages", MESSAGES)
def test_sentencepiece_chat_template_is_transformers_(piece_dir, qwen_dir, messages):
    assert load_tokenizer(piece_dir).apply_chat_template(messages) == load_tokenizer(qwen_dir).apply_chat_template(
        messages
    )


def test_a_template_sees_the_names_of_the_control_symbols(piece_dir, tmp_path):
    """As in transformers; but one that writes them is refused, since their characters would be read."""
    folder = shutil.copytree(piece_dir, tmp_path / "piece")
    template = folder / "chat_template.jinja"
    template.write_text("{{ (bos_token == '<s>') ~ (eos_token == '</s>') }}{{ messages[0]['content'] }}")
    messages = [{"role": "user", "content": "what does <s> do in HTML?"}]
    assert load_tokenizer(folder).apply_chat_template(messages) == "TrueTrue" + messages[0]["content"]
    template.write_text("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja writes <s>, </s>: .*--no-apply-chat-template"):
        load_tokenizer(folder).apply_chat_template(messages)


def test_without_a_template_beside_it_there_is_none(piece_dir, tmp_path):
    folder = shutil.copytree(piece_dir, tmp_path / "piece")
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_chat_template
    assert render("1+1?", DataConfig(prompt_template="plain", apply_chat_template=False), tokenizer) == "1+1?"
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja: --no-apply-chat-template"):
        render("1+1?", DataConfig(prompt_template="plain", apply_chat_template=True), tokenizer)


# Folders


def test_hf_files_come_first(qwen_dir, piece_dir, tmp_path):
    folder = shutil.copytree(qwen_dir, tmp_path / "both")
    shutil.copy(piece_dir / "tokenizer.model", folder)
    assert load_tokenizer(folder).encode(CORPUS[0]) == load_tokenizer(qwen_dir).encode(CORPUS[0])


def test_a_tokenizer_travels_with_the_model(qwen_dir, piece_dir, tmp_path):
    for folder in (qwen_dir, piece_dir):
        copy_config_files(folder, tmp_path / folder.name)
        moved, before = load_tokenizer(tmp_path / folder.name), load_tokenizer(folder)
        assert moved.encode(CORPUS[2]) == before.encode(CORPUS[2])
        assert moved.apply_chat_template(MESSAGES[0]) == before.apply_chat_template(MESSAGES[0])


def test_no_tokenizer_and_none_that_can_be_read(tmp_path):
    with pytest.raises(ValueError, match="absent has no tokenizer"):
        load_tokenizer(tmp_path / "absent")
    for content in (b"", b"no model", bytes(1000)):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model is no SentencePiece model"):
            load_tokenizer(tmp_path)


def test_code_in_a_folder_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


# The stop set


def test_stop_set_is_the_union(tmp_path):
    """256 <|endoftext|> from the tokenizer, [256, 258] from generation_config.json; alone where that has none."""
    tokenizer = load_tokenizer(BASE)
    assert stop_token_ids(tokenizer, BASE) == (256, 258)
    assert stop_token_ids(tokenizer, tmp_path) == (256,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert stop_token_ids(tokenizer, tmp_path) == (3, 256)


def test_a_stop_set_of_none_is_refused(tmp_path):
    letters = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no end of sequence"):
        stop_token_ids(load_tokenizer(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON object"),
        ("[256]", "is no JSON object"),
        ('{"eos_token_id": "<|im_end|>"}', "eos_token_id must be a token id or a list of them, not '<|im_end|>'"),
        ('{"eos_token_id": [256, null]}', "must be a token id or a list of them"),
    ],
)
def test_a_generation_config_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        stop_token_ids(load_tokenizer(BASE), tmp_path)


# Files and sizes


@pytest.mark.parametrize("left", [["config.json"], ["tokenizer_config.json"], ["vocab.json", "tokenizer_config.json"]])
def test_a_tokenizer_without_its_vocabulary_is_refused(qwen_dir, tmp_path, left):
    """transformers would make one that has no tokens, or splits every word into letters."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for name in set(left) - {"config.json"}:
        shutil.copyfile(qwen_dir / name, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"neither tokenizer\.json, nor vocab\.json with merges\.txt, nor tokenizer\.mod"
    ):
        load_tokenizer(tmp_path)


def test_a_vocabulary_with_rows_to_spare_fits(qwen_dir, piece_dir):
    """As Qwen2.5's: 151665 ids in 151936 rows."""
    for folder in (qwen_dir, piece_dir):
        tokenizer = load_tokenizer(folder)
        for rows in (tokenizer.vocab_size, tokenizer.vocab_size + 271):
            check_vocabulary(tokenizer, (0, tokenizer.vocab_size - 1), vocab_size=rows, folder=folder)


def test_a_vocabulary_that_is_another_model_s_is_refused():
    """259 ids, of which 256 and 258 are stops."""
    tokenizer = load_tokenizer(BASE)
    with pytest.raises(ValueError, match=r"token ids up to 258, the model only 258 rows .*One of the two is another"):
        check_vocabulary(tokenizer, (256, 258), vocab_size=258, folder=BASE)
    with pytest.raises(ValueError, match=r"no response could end with stop token 151645, -1 .* only 259 rows"):
        check_vocabulary(tokenizer, (256, 151645, -1), vocab_size=259, folder=BASE)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_file_is_named(qwen_dir: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(qwen_dir, tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder} has no tokenizer that transformers can read .*Copy it again"):
        load_tokenizer(folder)
