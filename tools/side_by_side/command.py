"""The README's reading guide as a page: HF's Llama on the left, ours on the right, `python -m tools.side_by_side`.

    python -m tools.side_by_side page.html                                  # the sources that are installed
    python -m tools.side_by_side page.html --ckpt ./weights --hf ./Llama    # with what each line computes

Lines that do the same work stand at the same height. Equal lines find each other; alignment.txt lists the rest. With
--ckpt, a prompt is read and two tokens are generated, and each line shows what it computed when its function was first
called: in the first layer, for the whole prompt, in the first turn of a loop.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import cache
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby, pairwise
from linecache import getline
from pathlib import Path
from textwrap import dedent
from types import CodeType, FrameType

import torch
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from torch import Tensor

from checkpoint.config import llama_config, read_config
from checkpoint.output import write
from checkpoint.tensors import open_checkpoint
from convert_weights import user_path
from llama_neuron import (
    ATTENTION,
    LlamaConfig,
    NeuronConfig,
    UsageError,
    backend_for,
    generate,
    integers,
    load_model,
    start,
)

ROOT = Path(__file__).parents[2]
FILES = {  # of the two columns
    "hf": [
        "transformers/models/llama/modeling_llama.py",
        "transformers/models/llama/configuration_llama.py",
        "transformers/modeling_rope_utils.py",
        "transformers/cache_utils.py",
        "transformers/masking_utils.py",
        "transformers/integrations/sdpa_attention.py",
        "transformers/integrations/flash_attention.py",
        "transformers/generation/utils.py",
        "transformers/modeling_utils.py",
        "torch/nn/modules/linear.py",
        "torch/nn/modules/sparse.py",
    ],
    "here": ["llama_neuron.py", "convert_weights.py"],
}
ALIGNMENT = "tools/side_by_side/alignment.txt"
# HF's column shows what a function's first call computed, number 0. All of HF's projections call one function, so this
# row shows its call after q, k and v, which is o_proj.
CALLS = {"nn.Linear (o, down)": 3}
NEW_TOKENS = 2  # one from reading the prompt, and one step of decoding


# ---- values


def summary(x: Tensor) -> str:
    """[shape] dtype, and then the value if there is one alone, else how many booleans are true, the range of integers,
    or the mean and standard deviation of floating-point values."""
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
    """Within `with`, notes the tensors that lines of a column's files assign or return. values[file, line, call] maps
    names to summaries, where `call` counts the calls of a function. Arguments belong to the line of `def`."""

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
        code = frame.f_code
        file = code.co_filename
        call = self.calls[code]
        if file not in self.files or call > max(CALLS.values()) or code.co_name.startswith("<"):
            return None
        self.calls[code] += 1
        known: dict[str, object] = {}
        first = code.co_firstlineno  # of the first decorator, if there is one
        definitions = (number for number in range(first, first + 20) if "def " in getline(file, number))
        line = next(definitions, first)

        def step(frame: FrameType, event: str, arg: object):
            nonlocal known, line
            names = dict(frame.f_locals)
            for name, value in names.items():
                if known.get(name) is not value:
                    self.note(file, line, call, name, value)
            if event == "return":
                self.note(file, line, call, "returns", arg)
            known = names
            line = frame.f_lineno
            return step

        return step(frame, event, arg)

    def note(self, file: str, line: int, call: int, name: str, value: object) -> None:
        values = value if isinstance(value, tuple | list) else [value]
        tensors = [x for x in values if isinstance(x, Tensor)]
        if tensors:
            self.values[file, line, call].setdefault(name, "; ".join(map(summary, tensors)))


def run_hf(trace: Trace, directory: Path, dtype: torch.dtype, prompt: list[int]) -> list[int]:
    """HF's new tokens, with each attention and cache that the guide names."""
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    with trace:
        type(model.model.rotary_emb)(model.config)  # from_pretrained builds it on the meta device, without values
    for attention, kv_cache in (("eager", None), ("sdpa", None), ("eager", "static")):
        model.set_attn_implementation(attention)
        model.generation_config = GenerationConfig(**settings, cache_implementation=kv_cache)
        with trace:
            sequences = model.generate(ids, attention_mask=torch.ones_like(ids))
    return sequences[0, len(prompt) :].tolist()


# ---- sources


@dataclass
class Line:
    code: str = ""
    html: str = ""
    number: int = 0
    is_docstring: bool = False
    values: dict[str, str] = field(default_factory=dict)


def located(path: str) -> Path:
    """Where a file of FILES is installed."""
    package, _, rest = path.partition("/")
    if not rest:
        return ROOT / path
    spec = find_spec(package)
    if spec is None:
        raise UsageError(f"{package} is not installed: pip install -r requirements.txt")
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
        file = located(path)
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        code = dedent("\n".join(file.read_text("utf-8").split("\n")[first - 1 : node.end_lineno]))
        html = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n")
        docstrings = docstring_lines(node)
        if lines:
            lines.append(Line())
        marked_lines = zip(code.split("\n"), html.split("\n"), strict=True)
        for number, (text, marked) in enumerate(marked_lines, start=first):
            values = trace.values.get((str(file), number, call), {})
            lines.append(Line(text, marked, number, number in docstrings, values))
    return lines


def docstring_lines(node: ast.stmt) -> set[int]:
    """The numbers of the lines of all docstrings in a definition."""
    numbers: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(part) is not None:
            docstring = part.body[0]
            numbers.update(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


# ---- alignment


def read_guide() -> list[list[str]]:
    """The rows of the README's reading guide: HF, here, what differs, why."""
    table = re.search(r"## Reading guide\n.*?\n\| ---.*?\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    rows = []
    for line in table[1].splitlines():
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def read_alignment() -> dict[str, list[tuple[str, str]]]:
    """For each row of the guide, the definitions of both columns, and then the anchors in both columns."""
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
        if fragment in lines[index].code and not lines[index].is_docstring:
            return index
    where = f"{sources(side)}, or not after the anchor before it"
    raise UsageError(f"{fragment!r}, an anchor of {title!r}, is not in {where}: mend {ALIGNMENT}")


def subjects(lines: list[Line]) -> dict[int, str]:
    """What lines are paired by, by index: the beginning of `class A`, `def f`, `x = 1` or `x: int` if it occurs once,
    else the whole line. Docstrings and lines without a space, such as brackets, are not paired."""
    beginnings = {}
    for index, line in enumerate(lines):
        code = line.code.strip()
        if " " in code and not line.is_docstring:
            beginnings[index] = re.match(r"(class|def) \w+|[\w.]+(, [\w.]+)*( = |: )|.*", code)[0]
    counts = Counter(beginnings.values())
    for index, beginning in beginnings.items():
        if counts[beginning] > 1:
            beginnings[index] = lines[index].code.strip()
    return beginnings


def pair_up(left: list[Line], right: list[Line]) -> list[tuple[int, int]]:
    """The indices of lines with the same subject, from top to bottom on both sides."""
    hf = subjects(left)
    here = subjects(right)
    hf_lines = list(hf)
    here_lines = list(here)
    matcher = SequenceMatcher(None, list(hf.values()), list(here.values()), autojunk=False)
    pairs = []
    for at, beside, size in matcher.get_matching_blocks():
        pairs += zip(hf_lines[at : at + size], here_lines[beside : beside + size], strict=True)
    return pairs


def align(title: str, left: list[Line], right: list[Line], anchors: list[tuple[str, str]]) -> list[tuple]:
    """Both columns cut into pieces whose first lines do the same work: at the anchors, and between them where lines
    can be paired."""
    cuts = [(0, 0)]
    at = 0
    beside = 0
    for hf, here in anchors:
        next_at = position(hf, left, at, "hf", title)
        next_beside = position(here, right, beside, "here", title)
        for index, index_beside in pair_up(left[at:next_at], right[beside:next_beside]):
            cuts.append((at + index, beside + index_beside))
        cuts.append((next_at, next_beside))
        at = next_at + 1
        beside = next_beside + 1
    for index, index_beside in pair_up(left[at:], right[beside:]):
        cuts.append((at + index, beside + index_beside))
    cuts.append((len(left), len(right)))
    return [(left[at:next_at], right[beside:next_beside]) for (at, beside), (next_at, next_beside) in pairwise(cuts)]


# ---- page

# marks the section that is read in the table of contents
SCRIPT = """
const links = new Map([...document.querySelectorAll("nav li a")].map((link) => [link.hash.slice(1), link]));
const mark = (entry) => links.get(entry.target.id).classList.toggle("current", entry.isIntersecting);
const watch = new IntersectionObserver((entries) => entries.forEach(mark), { rootMargin: "-15% 0px -85% 0px" });
document.querySelectorAll("section").forEach((section) => watch.observe(section));
"""


def inline(text: str) -> str:
    """A cell of the table, in HTML. Of Markdown it uses `code` alone."""
    return re.sub(r"`(.*?)`", r"<code>\1</code>", escape(text))


def sentence(text: str) -> str:
    """A cell of the table as a sentence."""
    if re.match("a |[a-z]{2}", text):  # it begins with a word, not with code or the name of a tensor
        text = text[0].upper() + text[1:]
    return inline(text + ".")


def heading(tag: str, text: str, names: str, side: str) -> str:
    """The heading of a column, with the files that its definitions are in."""
    files = dict.fromkeys(find(name, side)[0] for name in names.split())
    return f'<div><{tag}>{inline(text)}</{tag}><p class="file">{", ".join(files)}</p></div>'


def render_line(line: Line) -> str:
    """A line of code, and below it what it computed."""
    # where wrapped text starts: in a docstring's drawing, which has wide gaps, below its last column
    margin = r"(.*   )? *" if line.is_docstring else r" *"
    indent = re.match(margin, line.code).end()
    code = f'<span class="number">{line.number or ""}</span><code>{line.html}</code>'
    values = "".join(f'<p class="value"><b>{name}</b> {escape(text)}</p>' for name, text in line.values.items())
    kind = "line prose" if line.is_docstring else "line"
    return f'<div class="{kind}" style="--indent:{indent}">{code}{values}</div>'


def render_lines(lines: list[Line], beside: int, side: str) -> str:
    """One column of a piece. HF's docstrings are folded, and code far longer than the `beside` lines next to it."""
    total = sum(not line.is_docstring for line in lines)
    room = beside + 5
    is_long = total > room + 3
    code = 0
    kinds = []
    for line in lines:
        if side == "hf" and is_long and code >= room:
            kinds.append("more")
        elif side == "hf" and line.is_docstring:
            kinds.append("of documentation")
        else:
            kinds.append("")
        code += not line.is_docstring
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
    hf_column = read_lines(left, "hf", traces["hf"], CALLS.get(title, 0))
    here_column = read_lines(right, "here", traces["here"], 0)
    pieces = ""
    for number, (hf_lines, here_lines) in enumerate(align(title, hf_column, here_column, anchors)):
        sides = render_lines(hf_lines, len(here_lines), "hf") + render_lines(here_lines, len(hf_lines), "here")
        if hf_lines or here_lines:
            pieces += f'<div class="piece{" anchored" if number else ""}">{sides}</div>'
    notes = f"<p><b>What differs</b> {sentence(differs)}</p><p><b>Why</b> {sentence(why)}</p>"
    head = heading("h2", hf, left, "hf") + heading("h3", hf if here == "the same" else here, right, "here")
    return f'<section id="{slug(title)}"><header>{head}</header><div class="notes">{notes}</div>{pieces}</section>'


def slug(title: str) -> str:
    """A row's title as an HTML id."""
    return re.sub(r"\W+", "-", title).strip("-")


def render_page(traces: dict[str, Trace], run: str = "") -> str:
    """The whole page; `run` says what the values are from. Raises UsageError if a source has changed."""
    guide = read_guide()
    alignment = read_alignment()
    titles = [row[0].replace("`", "") for row in guide]
    if titles != [*alignment]:
        raise UsageError(f"README.md's reading guide and {ALIGNMENT} have other rows: {titles}")
    links = ""
    for title in titles:
        name = escape(title).replace("_", "_<wbr>")  # where a long name may break
        links += f'<li><a href="#{slug(title)}">{name}</a></li>'
    sections = "\n".join(render_pair(row, alignment, traces) for row in guide)
    style = Path(__file__).with_name("page.css").read_text()
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
<p>On the left is {sources("hf")}, on the right {sources("here")}, with the line numbers of the files. Lines that begin
under the same rule do the same work. HF's documentation is folded, and so are long passages that have no counterpart
here.</p>
<p>{escape(run)}</p>
{sections}
</main>
<script>{SCRIPT}</script>
</html>
"""


# ---- command


def work(args: argparse.Namespace, rank: int) -> None:
    """One rank's run; rank 0 also runs HF's model and writes the page."""
    neuron = NeuronConfig.from_pretrained(args.ckpt)
    (prompt,) = args.prompts
    traces = {side: Trace(side) for side in FILES}
    if rank == 0 and args.hf:
        check_source(args.hf, args.ckpt)
    for attention in ATTENTION:
        with traces["here"]:
            model = load_model(args.ckpt, rank, batch_size=1, backend=backend_for("cpu", attention))
            (new_tokens,) = generate(model, args.prompts, NEW_TOKENS, [])
    if rank != 0:
        return
    decode = args.tokenizer.decode if args.tokenizer else str
    chosen = f"{decode(new_tokens).strip()!r} here"
    if args.hf:
        hf_tokens = run_hf(traces["hf"], args.hf, neuron.dtype, prompt)
        chosen += f" and {decode(hf_tokens).strip()!r} at HF"
    run = (
        f"The values below a line are what it computed for the prompt {decode(prompt)!r}, in {neuron.torch_dtype} and "
        f"on rank 0 of {args.tp}, when its function was first called: in the first layer, for the whole prompt, and in "
        f"the first turn of a loop. The next two tokens are {chosen}."
    )
    write_page(args.out, traces, run)


def check_source(hf: Path, ckpt: str) -> None:
    """Raises UsageError if `ckpt` was converted from a checkpoint other than `hf`, or if `hf` cannot be read."""
    config = llama_config(read_config(hf))
    open_checkpoint(hf, config)
    # a conversion of yarn or longrope adds the attention factor that HF would compute
    converted = replace(LlamaConfig.from_pretrained(ckpt), rope_parameters=config.rope_parameters)
    if config != converted:
        raise UsageError(f"--hf {hf} is not what {ckpt} was converted from: name the source of the conversion")


def write_page(out: Path, traces: dict[str, Trace], run: str = "") -> None:
    """Writes the page. Raises UsageError if a source has changed, OSError if it cannot be written."""
    page = render_page(traces, run)
    write(out, lambda path: path.write_text(page, "utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the reading guide as a page.", usage=argparse.SUPPRESS)
    parser.add_argument("out", type=user_path, metavar="OUT.html", help="the page to write")
    parser.add_argument("--ckpt", metavar="DIR", help="what convert_weights.py wrote: shows what it computes")
    parser.add_argument("--hf", type=user_path, metavar="DIR", help="the source of --ckpt: shows what HF computes")
    parser.add_argument("--prompt", dest="prompts", nargs=1, metavar="TEXT", help="for both; default: stdin")
    parser.add_argument(
        "--prompt-ids",
        dest="prompts",
        nargs=1,
        type=integers,
        metavar="1,2,3",
        help="instead of text",
    )
    # what else start() reads
    parser.set_defaults(tp=None, device="cpu", batch_size=1, sequence_length=None, compile=False, timeout=60)
    args = parser.parse_args()
    out = args.out
    if not out.parent.is_dir():
        raise UsageError(f"{out} cannot be written: name a file in a directory that exists")
    if os.path.lexists(out) and not out.is_file():
        raise UsageError(f"{out} is not a regular file: name another one")
    if args.ckpt:
        start(args, work)
    elif args.hf or args.prompts:
        raise UsageError("--hf and a prompt need --ckpt: name a conversion")
    else:
        write_page(out, {side: Trace(side) for side in FILES})
