"""The small files of a Hugging Face checkpoint, read and checked: JSON, the settings of `generate`, the tokenizer."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from llama_neuron import UsageError

TEXTS = (".json", ".jinja", ".model", ".txt")
# what the tokenizers of transformers look for in a checkpoint
TOKENIZER_FILES = ("*tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model", "tekken.json")
TEMPLATES = ("chat_template*", "*.jinja", "additional_chat_templates/*")
LARGEST = 2**26  # bytes of a text file; the largest tokenizer.json seen has 33 MB
DEEPEST = 32  # lists and objects inside each other

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


# ---- JSON


def check_file(path: Path) -> None:
    """Raises UsageError for what might never end, or fill the memory: a FIFO, a device, a text beyond LARGEST. Raises
    PermissionError for what may not be read, which some libraries would report as not found."""
    try:
        found = path.stat()
    except FileNotFoundError:  # or a link to nothing
        return
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{path} is not a regular file: remove it")
    if path.suffix in TEXTS and found.st_size > LARGEST:
        raise UsageError(f"{path} has {found.st_size:,} bytes, more than the {LARGEST:,} that are read: remove it")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, "Permission denied, make it readable", str(path))


def check_files(directory: Path) -> None:
    """`check_file` for all that the tokenizers of transformers may open."""
    for pattern in ("config.json", *TOKENIZER_FILES, *TEMPLATES):
        for path in directory.glob(pattern):
            check_file(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UsageError if there is none, or if it is nested deeper than DEEPEST."""
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} not found: name a directory that holds a Llama checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
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
    check_file(hf / "generation_config.json")
    if (hf / "generation_config.json").exists():
        try:
            settings = read_json(hf / "generation_config.json")
            path = hf / "generation_config.json"
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
    check_files(hf)
    path = hf / "tokenizer.json"
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False, local_files_only=True)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return lambda out: tokenizer.save_pretrained(out, legacy_format=False, save_jinja_files=False)
    except Exception as error:  # transformers raises nearly all kinds
        reason = str(error).strip().partition("\n")[0]
    if not path.exists():
        say(f"{hf} has no tokenizer that can be read ({reason}): give prompts by --prompt-ids")
        return lambda out: None
    from tokenizers import Tokenizer

    try:
        plain = Tokenizer.from_file(str(path))
    except Exception as error:  # the class that it raises
        raise UsageError(f"{path} cannot be read, save it again with transformers: {error}") from None
    say(f"{path} is taken as it is, transformers cannot read it: {reason}")
    plain.no_truncation()
    plain.no_padding()
    return lambda out: plain.save(str(out / "tokenizer.json"))
