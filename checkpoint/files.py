"""The small files of a Hugging Face checkpoint, read and checked: JSON, the settings of `generate`, the tokenizer."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from llama_neuron import UsageError

TEXTS = (".json", ".jinja", ".model", ".txt", ".tokenizer", ".codes", ".spm")
# what the tokenizers of transformers may open in a checkpoint: the `VOCAB_FILES_NAMES` of all classes, and templates
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model*", "tiktoken.model", "tekken.json", "spiece.model"),
    *("spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json"),
    *("prophetnet.tokenizer", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "word_*.json"),
    *("chat_template.*", "additional_chat_templates/*.jinja"),
)
LARGEST = 2**26  # bytes of a text file; the largest tokenizer.json seen has 33 MB
DEEPEST = 32  # lists and objects inside each other

# how a text begins that is there in the place of a file, what it is, and what helps
WEB_PAGE = "a web page, not the file itself: download it again, and look at what the page says"
STAND_INS = {
    "version https://git-lfs": "a git LFS pointer, not the file itself: run `git lfs pull` where it was cloned",
    "<!doctype": WEB_PAGE,
    "<html": WEB_PAGE,
    "<?xml": WEB_PAGE,
}

# keys of generation_config.json that change a greedy search in HF, with the values that change nothing
NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "watermarking_config": None,
}

SHORTENED = reprlib.Repr()  # a file's value in a message may be long, and deep
SHORTENED.maxstring = 100
SHORTENED.maxother = 100
show = SHORTENED.repr


def say(message: str) -> None:
    """Tells the user on stderr what is done in another way than the checkpoint asks for."""
    # the message may quote an untrusted file
    message = "".join(character if character.isprintable() else "?" for character in message)
    print(f"convert_weights.py: {message}", file=sys.stderr)


def reason(error: BaseException) -> str:
    """What an exception of a library says, in one line of at most 400 characters."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__


# ---- whether a file can be read


def check_file(path: Path, is_weights: bool = False) -> None:
    """Opens a file before a library does, because libraries report many failures as "not found", or as damage.

    Raises UsageError for what might never end, or fill the memory (a FIFO, a device, a text beyond LARGEST), for a
    directory, for a link or a path that leads to no file, and for a text in the place of a file: a git LFS pointer, a
    web page, JSON in the place of weights. Raises OSError for what may not or cannot be read. A file that is not there
    is the caller's to report.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise UsageError(f"{path} is {kind}: remove it")
        if path.suffix in TEXTS and found.st_size > LARGEST:
            raise UsageError(f"{path} has {found.st_size:,} bytes, more than the {LARGEST:,} that are read: remove it")
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        if path.is_symlink():
            raise UsageError(f"{path} is missing, a link to {show(os.readlink(path))} is left: put it back") from None
        return
    except PermissionError:  # of the file, or of a folder on the way
        raise PermissionError(errno.EACCES, "Permission denied, make it readable", str(path)) from None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise UsageError(f"{path} cannot be read: {error.strerror}, correct the path") from None
        raise
    if b"\0" in start[:16]:  # binary, as all weights are
        return
    text = start.decode(errors="replace").lstrip("\ufeff \r\n\t").lower()
    for beginning, kind in STAND_INS.items():
        if text.startswith(beginning):
            raise UsageError(f"{path} is {kind}")
    if is_weights and text.startswith("{"):
        raise UsageError(f"{path} is JSON, not weights: download it again, and look at what it says")


def check_tokenizer_files(directory: Path) -> None:
    """`check_file` for all that the tokenizers of transformers may open. They pass over directories."""
    for pattern in TOKENIZER_FILES:
        for path in directory.glob(pattern):
            if path.exists() and not path.is_dir():
                check_file(path)


# ---- JSON


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UsageError if there is none, or if it is nested deeper than DEEPEST."""
    check_file(path)
    if not path.exists():
        raise UsageError(f"{path} not found: name a directory that holds a Llama checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    level = [value]
    for _ in range(DEEPEST):
        lists = [part for part in level if isinstance(part, list)]
        lists += [part.values() for part in level if isinstance(part, dict)]
        level = [part for parts in lists for part in parts]
    if level:
        raise UsageError(f"{path} is nested too deeply: correct it")
    return value


# ---- generate's settings, tokenizer


def ignored_settings(settings: dict) -> list[str]:
    """The keys in `settings` of `generate` that HF obeys in greedy search, and `llama_neuron.generate` does not."""
    return [key for key, neutral in NEUTRAL.items() if (settings.get(key) or neutral) != neutral]


def read_eos(hf: Path, raw: dict) -> list[int]:
    """The EOS ids at which HF's `generate` stops: those of generation_config.json, also if it names none, since the
    greedy ids have to be HF's; without that file, or if it is broken, those of config.json."""
    path = hf / "config.json"
    settings = raw
    generation_config = hf / "generation_config.json"
    if generation_config.is_file():  # else HF passes over it
        check_file(generation_config)
        try:
            settings = read_json(generation_config)
            path = generation_config
        except UsageError as error:
            say(f"{error}: config.json counts, as in HF")
    ignored = ignored_settings(settings)
    if ignored:
        say(f"{path} asks for {', '.join(ignored)}: ignored here, HF obeys them in greedy search too")
    eos = settings.get("eos_token_id")
    if not isinstance(eos, list):
        eos = [] if eos is None else [eos]
    if not all(type(token) is int for token in eos):
        raise UsageError(f"{path}: eos_token_id {show(eos)} must be token ids")
    return eos


def read_tokenizer(hf: Path) -> Callable[[Path], object]:
    """A function that writes tokenizer.json into a directory, so that a prompt's ids are HF's: as transformers'
    AutoTokenizer saves it, which knows of added and special tokens that stand in other files; without transformers, as
    it is. Truncation and padding are left out. Raises UsageError for a broken tokenizer.json."""
    check_tokenizer_files(hf)
    path = hf / "tokenizer.json"
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False, local_files_only=True)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return lambda out: tokenizer.save_pretrained(out, legacy_format=False, save_jinja_files=False)
    except Exception as error:  # transformers raises nearly all kinds
        why = reason(error)
    check_file(path)  # once more, for a link to nothing
    if not path.exists():
        say(f"{hf} has no tokenizer that can be read ({why}): give prompts by --prompt-ids")
        return lambda out: None
    from tokenizers import Tokenizer

    try:
        plain = Tokenizer.from_file(str(path))
    except Exception as error:  # the class that it raises
        raise UsageError(f"{path} cannot be read, save it again with transformers: {reason(error)}") from None
    say(f"{path} is taken as it is, transformers cannot read it: {why}")
    plain.no_truncation()
    plain.no_padding()
    return lambda out: plain.save(str(out / "tokenizer.json"))
