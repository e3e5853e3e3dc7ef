"""The README's reading guide as a page: HF's Llama on the left, this one on the right, `python -m tools.side_by_side`.

    python -m tools.side_by_side page.html                                  # the sources that are installed
    python -m tools.side_by_side page.html --ckpt ./weights --hf ./Llama    # with what each line computes

Lines that do the same work stand at the same height (tools/side_by_side.txt says which). With --ckpt, what a run of a
prompt and two new tokens computed stands under its line. It is what the first call of a function computed, so of a
layer the first one, reading the prompt, and of a loop the first turn.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from linecache import getline
from pathlib import Path
from textwrap import dedent
from types import CodeType, FrameType

import torch
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from torch import Tensor

from convert_weights import llama_config, open_checkpoint, read_config, require
from llama_neuron import (
    ATTENTION,
    LlamaConfig,
    NeuronConfig,
    Parts,
    UsageError,
    generate,
    integers,
    load_model,
    run_command,
    start,
)
from tools.output import write

ROOT = Path(__file__).parents[1]
HF = ("models/llama/modeling_llama.py", "models/llama/configuration_llama.py", "modeling_rope_utils.py")
HF += ("cache_utils.py", "masking_utils.py", "integrations/sdpa_attention.py", "integrations/flash_attention.py")
HF += ("generation/utils.py", "modeling_utils.py")
FILES = {  # of the two columns
    "hf": [f"transformers/{name}" for name in HF] + ["torch/nn/modules/linear.py", "torch/nn/modules/sparse.py"],
    "here": ["llama_neuron.py", "convert_weights.py"],
}
ALIGNMENT = "tools/side_by_side.txt"
CALLS = {"nn.Linear (o, down)": 3}  # whose values stand on the left: o_proj's, after q, k and v; else the first call's
NEW_TOKENS = 2  # reading the prompt, and one step of decoding


# ---- values


def summary(x: Tensor) -> str:
    """[shape] dtype, and mean and standard deviation; of integers the range, of booleans how many are true, and of a
    single number itself."""
    kind = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    if x.numel() == 0:
        return kind
    try:
        if x.numel() == 1:
            return f"{kind} {x.item():.4g}" if x.is_floating_point() else f"{kind} {x.item()}"
        if x.dtype == torch.bool:
            return f"{kind} {x.sum().item()} of {x.numel()} true"
        if not x.is_floating_point():
            return f"{kind} {x.min().item()} to {x.max().item()}"
        x = x.double()
        return f"{kind} mean {x.mean().item():.4g} std {x.std(correction=0).item():.4g}"
    except RuntimeError:  # on the meta device and inside vmap there are no values
        return kind


class Trace:
    """Within `with`, notes the tensors that lines of these files assign or return: values[file, line, call] has a
    summary for each name, `call` counting those of a function. Arguments stand at the line of `def`."""

    def __init__(self, side: str) -> None:
        self.files = {str(located(path)) for path in FILES[side]}
        self.calls: Counter[CodeType] = Counter()
        self.values: dict[tuple[str, int, int], dict[str, str]] = defaultdict(dict)

    def __enter__(self) -> None:
        sys.settrace(self.follow)

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def follow(self, frame: FrameType, event: str, arg: object):
        """Called for each new frame; what it returns is called for each line that is about to run in it."""
        code, file = frame.f_code, frame.f_code.co_filename
        call = self.calls[code]
        if file not in self.files or call > max(CALLS.values()) or code.co_name.startswith("<"):
            return None
        self.calls[code] += 1
        first = code.co_firstlineno  # that of a decorator, if there is one
        lines = (number for number in range(first, first + 20) if "def " in getline(file, number))
        known, line = {}, next(lines, first)

        def step(frame: FrameType, event: str, arg: object):
            nonlocal known, line
            names = dict(frame.f_locals)
            for name, value in names.items():
                if known.get(name) is not value:
                    self.note(file, line, call, name, value)
            if event == "return":
                self.note(file, line, call, "returns", arg)
            known, line = names, frame.f_lineno
            return step

        return step(frame, event, arg)

    def note(self, file: str, line: int, call: int, name: str, value: object) -> None:
        several = isinstance(value, tuple | list)
        tensors = [x for x in (value if several else [value]) if isinstance(x, Tensor)]
        if tensors:
            self.values[file, line, call].setdefault(name, "; ".join(map(summary, tensors)))


def run_hf(trace: Trace, directory: Path, dtype: torch.dtype, prompt: list[int]) -> list[int]:
    """HF's new tokens, with each attention and cache that the guide names."""
    from transformers import GenerationConfig, LlamaForCausalLM

    model, ids = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval(), torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    with trace:
        type(model.model.rotary_emb)(model.config)  # from_pretrained makes it without values
    for attention, kv_cache in (("eager", None), ("sdpa", None), ("eager", "static")):
        model.set_attn_implementation(attention)
        model.generation_config = GenerationConfig(**settings, cache_implementation=kv_cache)
        with trace:
            texts = model.generate(ids, attention_mask=torch.ones_like(ids))
    return texts[0, len(prompt) :].tolist()


# ---- sources


@dataclass
class Line:
    code: str = ""
    html: str = ""
    number: int = 0
    documents: bool = False  # is in a docstring
    values: dict[str, str] = field(default_factory=dict)


def located(path: str) -> Path:
    """Where a file of FILES is installed."""
    package, _, rest = path.partition("/")
    if not rest:
        return ROOT / path
    spec = find_spec(package)
    require(spec, f"{package} is not installed: pip install -r requirements.txt")
    return Path(spec.origin).parent / rest


@cache
def definitions(path: str) -> dict[str, ast.stmt]:
    """A file's functions, classes, methods and constants, by qualified name."""
    found = {}
    for node in ast.parse(located(path).read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = member
    return found


def find(name: str, side: str) -> tuple[str, ast.stmt]:
    """The file and the definition of a name; the class of a method may be left out. Raises UsageError if it is gone."""
    for path in FILES[side]:
        for qualified, node in definitions(path).items():
            if qualified == name or qualified.endswith(f".{name}"):
                return path, node
    raise UsageError(f"{name} is not in {sources(side)}: mend the README's reading guide and {ALIGNMENT}")


def sources(side: str) -> str:
    """What a column is made of, in words."""
    if side == "here":
        return " and ".join(FILES["here"])
    return f"transformers {version('transformers')} and torch {version('torch')}"


def read_lines(names: str, side: str, trace: Trace, call: int) -> list[Line]:
    """The lines of these definitions, with what they computed."""
    lines: list[Line] = []
    for name in names.split():
        path, node = find(name, side)
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        code = dedent("\n".join(located(path).read_text("utf-8").split("\n")[first - 1 : node.end_lineno]))
        html = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n")
        documents: set[int] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(part) is not None:
                documents |= {*range(part.body[0].lineno, part.body[0].end_lineno + 1)}
        if lines:
            lines.append(Line())
        marked_lines = zip(code.split("\n"), html.split("\n"), strict=True)
        for number, (text, marked) in enumerate(marked_lines, start=first):
            values = trace.values.get((str(located(path)), number, call), {})
            lines.append(Line(text, marked, number, number in documents, values))
    return lines


# ---- alignment


def read_guide() -> list[list[str]]:
    """The rows of the README's reading guide: HF, here, what differs, why."""
    table = re.search(r"## Reading guide\n.*?\n\| ---.*?\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    rows = []
    for line in table[1].splitlines():
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def read_alignment() -> dict[str, list[tuple[str, str]]]:
    """For each row of the guide the definitions and then the anchors, of both columns."""
    alignment = {}
    blocks = (ROOT / ALIGNMENT).read_text().strip().split("\n\n")
    for block in blocks[1:]:  # after the comment
        title, *lines = block.splitlines()
        pairs = [line.partition(" ~ ") for line in lines]
        alignment[title] = [(left, right or left) for left, _, right in pairs]
    return alignment


def position(fragment: str, lines: list[Line], start: int, side: str, title: str) -> int:
    """The first line with the fragment. Raises UsageError if there is none."""
    for index in range(start, len(lines)):
        if fragment in lines[index].code and not lines[index].documents:
            return index
    where = f"{sources(side)}, or not after the anchor before it"
    raise UsageError(f"{fragment!r}, an anchor of {title!r}, is not in {where}: mend {ALIGNMENT}")


def align(title: str, left: list[Line], right: list[Line], anchors: list[tuple[str, str]]) -> list[tuple]:
    """Both columns cut before each anchor: pieces whose first lines do the same work."""
    pieces, at, beside = [], 0, 0
    for hf, here in anchors:
        after = int(bool(pieces))
        next_at = position(hf, left, at + after, "hf", title)
        next_beside = position(here, right, beside + after, "here", title)
        pieces.append((left[at:next_at], right[beside:next_beside]))
        at, beside = next_at, next_beside
    return [*pieces, (left[at:], right[beside:])]


# ---- page

# marks the section that is read in the table of contents
SCRIPT = """
const links = new Map([...document.querySelectorAll("nav li a")].map((link) => [link.hash.slice(1), link]));
const mark = (entry) => links.get(entry.target.id).classList.toggle("current", entry.isIntersecting);
const watch = new IntersectionObserver((entries) => entries.forEach(mark), { rootMargin: "-15% 0px -85% 0px" });
document.querySelectorAll("section").forEach((section) => watch.observe(section));
"""


def inline(text: str) -> str:
    """Markdown of a table's cell, of which only `code` occurs."""
    return re.sub(r"`(.*?)`", r"<code>\1</code>", escape(text))


def sentence(text: str) -> str:
    if re.match("a |[a-z]{2}", text):  # a word: neither code nor the name of a tensor
        text = text[0].upper() + text[1:]
    return inline(text + ".")


def heading(tag: str, text: str, names: str, side: str) -> str:
    files = dict.fromkeys(find(name, side)[0] for name in names.split())
    return f'<div><{tag}>{inline(text)}</{tag}><p class="file">{", ".join(files)}</p></div>'


def render_line(line: Line) -> str:
    indent = len(line.code) - len(line.code.lstrip())
    code = f'<span class="number">{line.number or ""}</span><code>{line.html}</code>'
    values = "".join(f'<p class="value"><b>{name}</b> {escape(text)}</p>' for name, text in line.values.items())
    kind = "line prose" if line.documents else "line"
    return f'<div class="{kind}" style="--indent:{indent}">{code}{values}</div>'


def render_lines(lines: list[Line], beside: int, side: str) -> str:
    """One column of a piece. HF's docstrings are folded, and code far longer than the `beside` lines next to it."""
    room, code, kinds = beside + 5, 0, []
    total = sum(not line.documents for line in lines)
    for line in lines:
        kind = ""
        if side == "hf" and line.documents:
            kind = "of documentation"
        elif side == "hf" and code >= room and total > room + 3:
            kind = "more"
        kinds.append(kind)
        code += not line.documents
    html = ""
    for kind, numbers in groupby(range(len(lines)), key=kinds.__getitem__):
        part = [lines[number] for number in numbers]
        text = "".join(map(render_line, part))
        if kind and len(part) > 3:
            text = f"<details><summary>{len(part)} lines {kind}</summary>{text}</details>"
        html += text
    return f'<div class="{side}">{html}</div>'


def render_pair(row: list[str], alignment: dict, traces: dict[str, Trace]) -> str:
    """A section of the page. Raises UsageError if a source has changed."""
    hf, here, differs, why = row
    title = hf.replace("`", "")
    for name in re.findall(r"`(?:nn\.)?(\w+)`", hf):
        find(name, "hf")
    (left, right), *anchors = alignment[title]
    columns = read_lines(left, "hf", traces["hf"], CALLS.get(title, 0)), read_lines(right, "here", traces["here"], 0)
    pieces = ""
    for number, (hf_lines, here_lines) in enumerate(align(title, *columns, anchors)):
        sides = render_lines(hf_lines, len(here_lines), "hf") + render_lines(here_lines, len(hf_lines), "here")
        if hf_lines or here_lines:
            pieces += f'<div class="piece{" anchored" if number else ""}">{sides}</div>'
    notes = f"<p><b>What differs</b> {sentence(differs)}</p>"
    if why:
        notes += f"<p><b>Why</b> {sentence(why)}</p>"
    head = heading("h2", hf, left, "hf") + heading("h3", hf if here == "the same" else here, right, "here")
    return f'<section id="{slug(title)}"><header>{head}</header><div class="notes">{notes}</div>{pieces}</section>'


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title).strip("-")


def render_page(traces: dict[str, Trace], run: str = "") -> str:
    guide, alignment = read_guide(), read_alignment()
    titles = [row[0].replace("`", "") for row in guide]
    require(titles == [*alignment], f"README.md's reading guide and {ALIGNMENT} have other rows: {titles}")
    links = "".join(f'<li><a href="#{slug(title)}">{escape(title).replace("_", "_<wbr>")}</a></li>' for title in titles)
    sections = "\n".join(render_pair(row, alignment, traces) for row in guide)
    style = Path(__file__).with_suffix(".css").read_text()
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>llama_neuron beside Hugging Face</title>
<style>{style}</style>
<nav><a href="#top">llama_neuron beside Hugging Face</a><ol>{links}</ol></nav>
<main id="top">
<h1>llama_neuron beside Hugging Face</h1>
<p>On the left {sources("hf")}, on the right {sources("here")}.
Lines that begin under the same rule do the same work. Line numbers are those of the files. Folded are HF's
documentation and passages that have no counterpart here.</p>
<p>{escape(run)}</p>
{sections}
</main>
<script>{SCRIPT}</script>
</html>
"""


# ---- command


def work(args: argparse.Namespace, rank: int) -> None:
    """One rank's run, and on rank 0 HF's and the page."""
    neuron, prompt, texts = NeuronConfig.from_pretrained(args.ckpt), args.prompts[0], {}
    traces = {side: Trace(side) for side in FILES}
    if rank == 0 and args.hf:
        config = llama_config(read_config(args.hf))
        open_checkpoint(args.hf, config)
        converted = replace(LlamaConfig.from_pretrained(args.ckpt), rope_parameters=config.rope_parameters)
        require(config == converted, f"--hf {args.hf} is not what {args.ckpt} was converted from: name that")
    for attention in ATTENTION:
        with traces["here"]:
            model = load_model(args.ckpt, rank, batch_size=1, parts=Parts.of_device("cpu", attention))
            (texts["here"],) = generate(model, args.prompts, NEW_TOKENS, [])
    if rank != 0:
        return
    if args.hf:
        texts["at HF"] = run_hf(traces["hf"], args.hf, neuron.dtype, prompt)
    decode = args.tokenizer.decode if args.tokenizer else str
    chosen = " and ".join(f"{decode(ids)!r} {where}" for where, ids in texts.items())
    run = (
        f"Under a line stands what it computed for {decode(prompt)!r} in {neuron.torch_dtype}, on rank 0 of {args.tp}: "
    )
    run += (
        "in the first call of its function, so in the first layer and for the whole prompt, and in the first turn of "
    )
    run += f"a loop. The next two tokens are {chosen}."
    page = render_page(traces, run)
    write(args.out, lambda path: path.write_text(page, "utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the reading guide as a page.", usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT.html", help="the page to write")
    add("--ckpt", metavar="DIR", help="what convert_weights.py wrote: shows what it computes")
    add("--hf", type=Path, metavar="DIR", help="what that was converted from: shows what HF computes")
    add("--prompt", dest="prompts", nargs=1, metavar="TEXT", help="for both; default: stdin")
    add("--prompt-ids", dest="prompts", nargs=1, type=integers, metavar="1,2,3", help="instead of text")
    parser.set_defaults(tp=None, device="cpu", batch_size=1, sequence_length=None, compile=False, timeout=60)
    args = parser.parse_args()
    out = args.out
    require(out.parent.is_dir(), f"{out} cannot be written: name a file in a directory that exists")
    require(out.is_file() or not os.path.lexists(out), f"{out} is no regular file: name another one")
    if args.ckpt:
        start(args, work)
    else:
        require(not args.hf and not args.prompts, "--hf and a prompt need --ckpt: name a conversion")
        page = render_page({side: Trace(side) for side in FILES})
        write(out, lambda path: path.write_text(page, "utf-8"))


if __name__ == "__main__":
    run_command(main)
