"""tools.side_by_side: the page in Chromium, its alignment, and its values against what HF and tools.capture compute."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.command import run_command
from tests.browser import Browser, require_chromium
from tests.helpers import ROOT, command, hf_model
from tools.capture import capture
from tools.side_by_side.command import FILES, Line, align, find, main, read_alignment

PROMPT = [5, 11, 2, 60, 33]  # of tokens that the tiny checkpoints have
TABLE = (ROOT / "README.md").read_text().partition("| HF | here |")[2].partition("\n\n")[0]
ROWS = [re.split(r" ?\| ?", line)[1:5] for line in TABLE.splitlines()[2:]]


def write_page(*arguments: object) -> None:
    """`python -m tools.side_by_side ARGUMENTS`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["side_by_side.py", *map(str, arguments)])
        run_command(main)


@pytest.fixture(scope="module")
def page(hf_checkpoint: Callable, converted: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small model with 8 heads and 2 KV heads, with values of both sides."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    ids = ",".join(map(str, PROMPT))
    write_page(out, "--ckpt", converted("llama-3"), "--hf", hf_checkpoint("llama-3"), "--prompt-ids", ids)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_absent_chromium_fails_in_ci_and_skips_elsewhere(ci, outcome, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="chromium, chromedriver"):
        require_chromium()


# ---- the page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_laptop_shows_the_page_without_sideways_scrolling_errors_or_network(theme, page, browser):
    browser.open(page, theme, width=1280)
    assert not browser.overflows()
    browser.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    assert not browser.overflows()
    assert browser.evaluate("performance.getEntriesByType('resource').length") == 0
    assert browser.console_errors() == []


COLOURS = """(() => {
  const background = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? background(node.parentElement) : colour;
  };
  const texts = [...document.querySelectorAll("nav *, main *")].filter((node) => node.innerText?.trim());
  return [...new Set(texts.map((node) => getComputedStyle(node).color + background(node)))];
})()"""


def luminance(channels: list[int]) -> float:
    """WCAG 2.1's relative luminance of red, green and blue from 0 to 255."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_that_reading_needs(theme, page, browser):
    browser.open(page, theme)
    pairs = browser.evaluate(COLOURS)
    assert len(pairs) >= 7  # ink, muted, keywords, strings, names, literals, values
    for pair in pairs:
        channels = [int(number) for number in re.findall(r"\d+", pair)]
        dark, light = sorted([luminance(channels[:3]), luminance(channels[3:])])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair  # WCAG 2.1, 1.4.3


def test_the_themes_differ(page, browser):
    colours = set()
    for theme in ("light", "dark"):
        browser.open(page, theme)
        colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_every_row_of_the_reading_guide_is_there_with_its_words(page, browser):
    browser.open(page)
    sections = browser.evaluate("[...document.querySelectorAll('section')].map((section) => section.innerText)")
    assert len(sections) == len(ROWS) > 15
    for text, (hf, here, differs, why) in zip(sections, ROWS, strict=True):
        text = text.lower()
        for cell in (hf, hf if here == "the same" else here, differs, why):
            assert cell.replace("`", "").lower() in text


def test_the_table_of_contents_stays_in_view_and_says_where_the_reader_is(page, browser):
    browser.open(page, height=800)
    for number in range(len(ROWS)):
        browser.evaluate(f"document.querySelectorAll('nav li a')[{number}].click()")
        # two frames later the observer has been called
        browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        current = "[...document.querySelectorAll('nav li a')].map((link) => link.className == 'current')"
        assert browser.evaluate(current) == [index == number for index in range(len(ROWS))]
        top, bottom = browser.evaluate(
            "[...['top', 'bottom']].map((side) => document.querySelector('nav').getBoundingClientRect()[side])"
        )
        assert (top, bottom) == (0, 800)


# ---- alignment


def test_lines_that_do_the_same_work_stand_at_the_same_height(page, browser):
    """A pair is listed, or its lines are alike up to the name that they define or assign."""
    browser.open(page)
    find = "[...document.querySelectorAll('section')].map((section) => [...section.querySelectorAll('.anchored')].map("
    find += "(piece) => [...piece.children].map((column) => {"
    find += "const line = column.querySelector('.line'), code = line.querySelector('code');"
    find += "return [code.textContent, line.getBoundingClientRect().top, code.getBoundingClientRect().left]; })))"
    sections = browser.evaluate(find)
    alignment = read_alignment()
    assert sum(map(len, sections)) > 150
    for pieces, (_, *anchors) in zip(sections, alignment.values(), strict=True):
        for (left, left_top, left_x), (right, right_top, right_x) in pieces:
            if anchors and anchors[0][0] in left and anchors[0][1] in right:
                anchors.pop(0)
            else:
                beginnings = {re.split(r" = |:|\(", code.strip())[0] for code in (left, right)}
                assert len(beginnings) == 1, beginnings
            assert left_top == right_top
            assert left_x < right_x
        assert anchors == []


def test_equal_lines_and_names_that_occur_once_are_paired_without_being_listed():
    left = """\
class LlamaMLP(Module):
    def forward(self, x):
        size = 1
        x = self.norm(x)
        x = dropout(x)
        x = residual + x
        if training:
            x = again(x)
        return x, None"""
    right = """\
class LlamaMLP(nn.Module):
    width: int
    def forward(self, x: Tensor, size: int) -> Tensor:
        x = self.norm(x)
        x = kernel(x)
        x = residual + x
        return x"""
    columns = [[Line(code) for code in source.splitlines()] for source in (left, right)]
    pairs = [[lines[0].code.strip() for lines in piece] for piece in align("title", *columns, [])[1:]]
    assert pairs == [
        ["class LlamaMLP(Module):", "class LlamaMLP(nn.Module):"],
        ["def forward(self, x):", "def forward(self, x: Tensor, size: int) -> Tensor:"],
        ["x = self.norm(x)", "x = self.norm(x)"],
        ["x = residual + x", "x = residual + x"],
    ]


def test_the_reading_guide_follows_the_order_of_the_file():
    numbers = []
    for (_, here), *_ in read_alignment().values():
        path, definition = find(here.split()[0], "here")
        if path == "llama_neuron.py":
            numbers.append(definition.lineno)
    assert numbers == sorted(numbers)


def copy_sources(folder: Path) -> dict[str, Path]:
    """The repository's sources and HF's, in a folder where a test can change them."""
    for name in ("checkpoint", "launch", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("README.md", "llama_neuron.py", "convert_weights.py"):
        shutil.copy(ROOT / name, folder)
    installed = Path(find_spec("transformers").origin).parent.parent
    for name in ["transformers/__init__.py", *FILES["hf"]]:
        if name.startswith("transformers/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed / name, folder / name)
    return folder


@pytest.mark.parametrize(
    "file, old, new, named",
    [
        ("transformers/models/llama/modeling_llama.py", "class LlamaRMSNorm(", "class RMSNorm(", "LlamaRMSNorm is not"),
        ("transformers/generation/utils.py", "def generate(", "def generate2(", "generate is not"),
        (
            "transformers/modeling_rope_utils.py",
            "old_context_len = ",
            "context_len = ",
            "'old_context_len =', an anchor of",
        ),
        ("llama_neuron.py", "self.Wqkv = ", "self.fused = ", "'self.Wqkv =', an anchor of"),
        ("README.md", "| `repeat_kv` | in", "| `expand_kv` | in", "other rows"),
    ],
)
def test_a_source_that_has_changed_ends_in_one_line_and_code_2(file, old, new, named, tmp_path):
    folder = copy_sources(tmp_path)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    code = "import runpy; runpy.run_module('tools.side_by_side', run_name='__main__', alter_sys=True)"
    environment = {"PYTHONPATH": str(folder)}
    done = command("-P", "-c", code, tmp_path / "page.html", **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not (tmp_path / "page.html").exists()


# ---- values


def shown_values(browser: Browser, section: str, side: str, code: str) -> dict[str, tuple[str, float, float]]:
    """Under the first line with this code: shape and dtype, mean and deviation of each name, integers aside."""
    find = f"[...document.querySelectorAll('#{section} .{side} .line')].map((line) => [line.querySelector('code')"
    find += ".textContent, [...line.querySelectorAll('.value')].map((value) => value.textContent)])"
    (values, *_) = [values for text, values in browser.evaluate(find) if code in text]
    found = {}
    for name, kind, mean, deviation in re.findall(r"(\w+) (\[.*\] \w+) mean (\S+) std (\S+)", "\n".join(values)):
        found[name] = kind, float(mean), float(deviation)
    return found


def assert_shows(shown: tuple[str, float, float], tensor: Tensor) -> None:
    kind, mean, deviation = shown
    assert kind == f"{list(tensor.shape)} float32"
    assert mean == pytest.approx(tensor.mean().item(), rel=2e-3, abs=1e-5)  # four digits are shown
    assert deviation == pytest.approx(tensor.std(correction=0).item(), rel=2e-3)


def test_values_are_those_of_a_real_run(page, converted, browser):
    captured = capture(converted("llama-3"), [PROMPT], 2)
    prompt = {name: tensor[:, : len(PROMPT)] for name, tensor in captured.items()}
    browser.open(page)
    values = shown_values(browser, "LlamaAttention", "here", "query_states, key_states = apply_rotary_pos_emb(")
    assert_shows(values["query_states"], prompt["layers.0.q"].transpose(1, 2))
    assert_shows(values["key_states"], prompt["layers.0.k"].transpose(1, 2))
    values = shown_values(browser, "LlamaAttention", "here", "attn_output = self.attention(")
    assert_shows(values["attn_output"], prompt["layers.0.heads"].transpose(1, 2))
    values = shown_values(browser, "LlamaAttention", "here", "return self.o_proj(")
    assert_shows(values["returns"], prompt["layers.0.attention"])
    values = shown_values(browser, "LlamaMLP", "here", "return self.down_proj(")
    assert_shows(values["returns"], prompt["layers.0.mlp"])
    values = shown_values(browser, "LlamaDecoderLayer-LlamaModel", "here", "hidden_states = layer(")
    assert_shows(values["hidden_states"], prompt["hidden_states.1"])
    values = shown_values(browser, "LlamaDecoderLayer-LlamaModel", "here", "return self.norm(")
    assert_shows(values["returns"], prompt["final_norm"])


def test_values_on_the_left_are_hfs(page, hf_checkpoint, browser):
    model, seen = hf_model(hf_checkpoint("llama-3"), torch.float32), {}
    layer = model.model.layers[0]
    for name, module in {"q": layer.self_attn.q_proj, "o": layer.self_attn.o_proj, "mlp": layer.mlp}.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    with torch.inference_mode():
        states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    browser.open(page)
    values = shown_values(browser, "nn-Linear-q-k-v-gate-up-lm_head", "hf", "return F.linear(")
    assert_shows(values["returns"], seen["q"])
    values = shown_values(browser, "nn-Linear-o-down", "hf", "return F.linear(")
    assert_shows(values["returns"], seen["o"])
    values = shown_values(browser, "LlamaAttention", "hf", "attn_output = self.o_proj(")
    assert_shows(values["attn_output"], seen["o"])
    values = shown_values(browser, "LlamaMLP", "hf", "down_proj = self.down_proj(")
    assert_shows(values["down_proj"], seen["mlp"])
    values = shown_values(browser, "LlamaDecoderLayer-LlamaModel", "hf", "inputs_embeds: torch.Tensor = ")
    assert_shows(values["inputs_embeds"], states[0])
    values = shown_values(browser, "LlamaDecoderLayer-LlamaModel", "hf", "hidden_states = decoder_layer(")
    assert_shows(values["hidden_states"], states[1])


def test_each_attention_and_each_cache_that_ran_has_values(page, browser):
    browser.open(page)
    lines = {
        "sdpa_attention_forward": {"hf": "functional.scaled_dot_product_attention(", "here": "return F.scaled_dot"},
        "flash-attention-a-kernel": {"here": "output = output / total"},
        "StaticLayer-DynamicCache": {"hf": "def update(", "here": "def update("},
        "LlamaRotaryEmbedding-ROPE_INIT_FUNCTIONS": {"hf": "inv_freq, self.attention", "here": "inv_freq = 1.0 /"},
    }
    for section, sides in lines.items():
        for side, code in sides.items():
            assert shown_values(browser, section, side, code), (section, side)


@pytest.mark.slow
def test_on_two_ranks_shapes_are_those_of_rank_0(converted, browser, tmp_path):
    ids = ",".join(map(str, PROMPT))
    done = command(
        "-m", "tools.side_by_side", tmp_path / "page.html", "--ckpt", converted("llama-3", 2), "--prompt-ids", ids
    )
    assert done.returncode == 0, done.stderr
    browser.open(tmp_path / "page.html")
    values = shown_values(browser, "LlamaAttention", "here", "query_states, key_states = apply_rotary_pos_emb(")
    assert [kind for kind, _, _ in values.values()] == ["[1, 4, 5, 8] float32", "[1, 1, 5, 8] float32"]


# ---- the command


def test_without_a_checkpoint_the_page_has_no_values(browser, tmp_path):
    write_page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("document.querySelectorAll('section').length") == len(ROWS)
    assert browser.evaluate("document.querySelectorAll('.value').length") == 0


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere/page.html"], "nowhere/page.html"),
        (["."], "not a regular file"),
        (["{tmp}/pipe"], "not a regular file"),
        (["{tmp}/dangling"], "not a regular file"),
        (["{tmp}/page.html", "--hf", "{hf}"], "--ckpt"),
        (["{tmp}/page.html", "--prompt", "text"], "--ckpt"),
        (["{tmp}/page.html", "--ckpt", "{hf}"], "not a complete conversion"),
        (["{tmp}/page.html", "--ckpt", "{ckpt}", "--hf", "nowhere", "--prompt-ids", "1"], "nowhere"),
        (["{tmp}/page.html", "--ckpt", "{ckpt}", "--hf", "{other}", "--prompt-ids", "1"], "was converted from"),
        (["{tmp}/page.html", "--ckpt", "{ckpt}", "--prompt", "text"], "tokenizer.json"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(arguments, named, hf_checkpoint, converted, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    places = {"tmp": tmp_path, "hf": hf_checkpoint("llama-3"), "ckpt": converted("llama-3")}
    places["other"] = hf_checkpoint("llama-2")
    capsys.readouterr()  # of making the checkpoints
    with pytest.raises(SystemExit) as stop:
        write_page(*(argument.format(**places) for argument in arguments))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "page.html").exists()
