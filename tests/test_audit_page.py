"""The page and the picture of `tools.audit.page`, of reports that are made up here, in headless Chromium."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser import Browser
from tools.audit.page import page, plot

KINDS = ("q", "k", "v", "heads", "attention", "mlp", "residual")
FOREIGN = "<script>document.title = 'broken in'</script> & \"co\" </script>"


def place_names(layers: int) -> list[str]:
    inner = [f"layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    return ["embedding", *inner, "final_norm", "logits"]


def make_report(layers: int = 4, texts: tuple[tuple[int, int], ...] = ((5, 12), (9, 12)), **changes: object) -> dict:
    """A report that passes at tp 2. `texts` are prompt tokens and positions; `changes` replace keys."""
    draw = random.Random(layers)
    names = place_names(layers)
    strip, places = [], []
    for _ in names:
        grown = 1 + 0.1 * len(strip) / len(names)
        strip.append([[grown * draw.uniform(0.8, 1.25) for _ in range(positions)] for _, positions in texts])
    for phase in ("prefill", "decode"):
        for name in names:
            layer = int(name.split(".")[1]) if name.startswith("layers.") else None
            entry = {"place": name, "layer": layer, "kind": name.split(".")[-1], "phase": phase}
            entry |= {"max_abs": 0.03125, "mean_abs": 1.7e-3, "rel_l2": 4.3e-3, "cosine": 0.999991, "max_ulp": 8.0}
            entry |= {"r": draw.uniform(0.9, 1.2), "own_r": draw.uniform(0.8, 1.1), "r_bound": 1.8, "own_bound": 1.3}
            places.append(entry | {"ok": True})
    rule = {"passed": True, "note": "largest error 0.011 of 0.05"}
    return {
        "passed": True,
        "bitwise": False,
        "verdict": "passed: every place rounds as HF does, the largest R is 1.20 at layers.2.mlp in decode",
        "command": "python -m tools.audit --hf ./SmolLM2-135M-Instruct --ckpt ./weights --tp 2",
        "setting": {
            "hf": "SmolLM2-135M-Instruct",
            "subject": "./weights, tp 2, cpu",
            "dtype": "bfloat16",
            "exact": "float32",
            "layers": layers,
            "versions": "torch 2.13.0, transformers 5.24.0",
            "date": "2026-11-25",
            "seconds": 12.3,
            "peak_gb": 1.9,
        },
        "texts": [{"ids": [*range(positions + 1)], "prompt_tokens": prompt} for prompt, positions in texts],
        "bounds": [{"places": "logits", "r": 1.8, "own_r": 1.3}, {"places": ".*", "r": 1.8, "own_r": 1.3}],
        "places": places,
        "not_seen": [],
        "kinds": [
            {"kind": "q", "own_r": 1.0, "own_bound": 1.1, "ok": True},
            {
                "kind": "v",
                "own_r": 1.3,
                "own_bound": 1.1,
                "ok": False,
                "of": "RMSNorm",
                "share": 1.0,
                "share_error": 0.02,
            },
        ],
        "strip": {"places": names, "r": strip},
        "first": None,
        "causes": [],
        "next": ["Nothing: the port rounds as HF does."],
        "logits": {
            "positions": 24,
            "top1_agreement": 1.0,
            "first_other": None,
            "mean_kl": 1.2e-5,
            "max_kl": 1.1e-4,
            "hf_mean_kl": 1.3e-5,
            "nxdi": rule,
            "vllm_neuron": rule,
        },
    } | changes


def bitwise() -> dict:
    report = make_report(bitwise=True, verdict="bitwise equal: all 31 places have the bits of HF in bfloat16")
    for entry in report["places"]:
        entry |= {"max_abs": 0.0, "mean_abs": 0.0, "rel_l2": 0.0, "cosine": 1.0, "max_ulp": 0.0, "r": 1.0, "own_r": 1.0}
    report["strip"]["r"] = [[[1.0] * len(row) for row in rows] for rows in report["strip"]["r"]]
    return report


def failed(layers: int = 30, texts: tuple[tuple[int, int], ...] = ((8, 24), (13, 29)), first_layer: int = 3) -> dict:
    """Wrong from one layer's heads on, in decode: of the first text, and 4 positions after its prompt."""
    first = f"layers.{first_layer}.heads"
    report = make_report(layers, texts, passed=False, verdict=f"failed: {first} is out of bounds in decode, step 5")
    names, prompt = report["strip"]["places"], texts[0][0]
    start = names.index(first)
    draw = random.Random(1)
    for entry in report["places"][len(names) + start :]:
        entry |= {"r": draw.uniform(9, 30), "ok": False, "rel_l2": 0.21, "max_abs": 3.5, "max_ulp": 1184.0}
    report["places"][len(names) + start]["own_r"] = 41.7
    for rows in report["strip"]["r"][start:]:
        for position in range(prompt + 4, len(rows[0])):
            rows[0][position] *= draw.uniform(5, 40)
    for layer in range(layers):  # k and v of decode were not captured
        for kind in ("k", "v"):
            report["not_seen"].append(f"layers.{layer}.{kind}")
            index = names.index(f"layers.{layer}.{kind}")
            for row, (prompt_tokens, positions) in enumerate(texts):
                report["strip"]["r"][index][row][prompt_tokens:] = [None] * (positions - prompt_tokens)
    unseen = {(name, "decode") for name in report["not_seen"]}
    report["places"] = [entry for entry in report["places"] if (entry["place"], entry["phase"]) not in unseen]
    report["first"] = {"place": first, "layer": first_layer, "module": "self_attn", "phase": "decode", "step": 5}
    report["first"] |= {"row": 0, "position": prompt + 4, "heads": [4, 5], "ranks": [1]}
    meaning = "A decoded token does not see the slot that the step before it wrote."
    evidence = "With slot 11 masked, HF gives the subject's heads 4 and 5 within R 1.04; without, R is 41.7."
    report["causes"] = [{"name": "the last slot of the cache is hidden", "meaning": meaning, "evidence": evidence}]
    report["next"] = ["The mask of decode: does it compare slots with <= position?", "The order of the cache's update."]
    report["logits"] |= {"top1_agreement": 0.8125, "first_other": {"row": 0, "position": prompt + 4}, "mean_kl": 0.31}
    report["logits"]["nxdi"] = {"passed": False, "note": "largest error 0.31 of 0.05, at token 5"}
    return report


def large() -> dict:
    return failed(layers=32, texts=((512, 600),), first_layer=17)


def not_finite() -> dict:
    """NaN from a layer on, infinity before it, zeros and nulls elsewhere."""
    report = failed(layers=6, first_layer=2)
    for entry in report["places"]:
        if (entry["layer"] or 0) > 2:
            entry |= {"r": "nan", "own_r": None, "max_abs": "nan", "mean_abs": "nan", "rel_l2": "nan", "cosine": "nan"}
            entry |= {"max_ulp": "nan", "ok": False}
    report["places"][0] |= {"r": 0.0, "own_r": None, "max_abs": 0.0}
    report["places"][8]["max_abs"] = "inf"
    for name, rows in zip(report["strip"]["places"], report["strip"]["r"], strict=True):
        if name.startswith(("layers.3", "layers.4", "layers.5")):
            rows[0][10:] = ["nan"] * len(rows[0][10:])
            rows[1][:3] = ["inf"] * 3
    return report


def foreign() -> dict:
    """A failed report, every string and name of which tries to end its element."""

    def spoil(value: object) -> object:
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        if isinstance(value, str) and value not in ("prefill", "decode"):
            return value + FOREIGN
        return value

    return spoil(failed(layers=2, first_layer=1))


REPORTS: dict[str, Callable[[], dict]] = {
    "passed": make_report,
    "bitwise": bitwise,
    "failed": failed,
    "large": large,
    "not finite": not_finite,
    "foreign": foreign,
}

# every element with text of its own: what it says, and its contrast with the background behind it, by WCAG 2
CONTRASTS = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const opaque = (color) => channels(color)[3] !== 0;
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.tagName === "SCRIPT" || !element.getClientRects().length) continue;
    let behind = element;
    while (behind !== document.documentElement && !opaque(getComputedStyle(behind).backgroundColor))
      behind = behind.parentElement;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    const pair = [luminance(color), luminance(getComputedStyle(behind).backgroundColor)];
    found.push([(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.textContent, element.tagName]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., dict]:
    """show(name): opens the page of this report in the browser, and returns the report."""

    def open_page(name: str, **view: object) -> dict:
        report = REPORTS[name]()
        (tmp_path / "page.html").write_text(page(report), encoding="utf-8")
        browser.open(tmp_path / "page.html", **view)
        return report

    return open_page


@pytest.mark.parametrize("width", [800, 1280])
@pytest.mark.parametrize("name", REPORTS)
def test_a_page_has_no_errors_and_does_not_scroll_sideways(name, width, browser, show):
    show(name, width=width)
    assert browser.console_errors() == []
    assert not browser.overflows()
    assert browser.evaluate("[...document.querySelectorAll('td')].every((x) => x.scrollWidth <= x.clientWidth)")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["passed", "failed", "not finite"])
def test_all_text_stands_out_from_its_background(name, theme, browser, show):
    show(name, theme=theme)
    found = browser.evaluate(CONTRASTS)
    assert {"P", "TD", "TH", "DT", "DD", "CODE", "PRE", "A", "text"} <= {tag for _, _, tag in found}
    assert min(found)[0] >= 4.5, min(found)
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (theme == "dark")


def test_a_page_needs_no_other_file(browser, show):
    show("failed")
    links = "[...document.querySelectorAll('[src], [srcset], [href]')]"
    links = browser.evaluate(f"{links}.map((x) => x.getAttribute('srcset') ?? x.getAttribute('src') ?? x.hash)")
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    anchors = [link[1:] for link in links if link.startswith("#")]
    assert browser.evaluate(f"{anchors}.every((id) => document.getElementById(id))")
    loaded = browser.evaluate("performance.getEntriesByType('resource').map((x) => x.name.slice(0, 5))")
    assert set(loaded) <= {"data:"}


@pytest.mark.parametrize("name, word", [("passed", "Passed"), ("bitwise", "Bitwise equal"), ("failed", "Failed")])
def test_the_verdict_comes_first_and_in_words(name, word, browser, show):
    report = show(name)
    headings = browser.evaluate("[...document.querySelectorAll('h1, section > h2')].map((x) => x.innerText)")
    assert headings[0].endswith(word)
    assert headings[1:] == [
        "Setting",
        "R by place and position",
        "Divergence by layer",
        "Own R of all layers together",
        "Places",
        "Not seen",
        "Logits",
        "What to look at next",
        "Repeat",
    ]
    text = browser.evaluate("document.querySelector('header').innerText")
    assert report["verdict"] in text
    assert ("first place out of bounds" in text) == (name == "failed")


def test_a_failure_says_where_and_why(browser, show):
    (cause,) = show("failed")["causes"]
    text = browser.evaluate("document.querySelector('header').innerText")
    for fact in ("layers.3.heads", "layer\n3", "self_attn", "decode, step 5", "12 of text 0", "4, 5", "ranks\n1"):
        assert fact in text
    for value in cause.values():
        assert value in text
    browser.evaluate("document.querySelector('header a').click()")
    assert browser.evaluate("document.querySelector(':target th').innerText") == "✗ layers.3.heads"
    row, head = browser.evaluate("[':target', 'thead'].map((x) => document.querySelector(x).getBoundingClientRect())")
    assert row["top"] >= head["bottom"]


@pytest.mark.parametrize("name", ["passed", "large", "not finite"])
def test_the_table_has_every_place_in_both_phases(name, browser, show):
    report = show(name)
    rows = browser.evaluate("[...document.querySelectorAll('tbody tr')].map((x) => x.innerText.split('\\t'))")
    assert [row[0].removeprefix("✗ ") for row in rows] == report["strip"]["places"]
    layers = browser.evaluate("[...document.querySelectorAll('tbody')].map((x) => x.rows.length)")
    assert layers == [1] + [len(KINDS)] * report["setting"]["layers"] + [2]
    found = {(entry["place"], entry["phase"]): entry for entry in report["places"]}
    for place, row in zip(report["strip"]["places"], rows, strict=True):
        failing = False
        for phase, cells in (("prefill", row[1:8]), ("decode", row[8:])):
            entry = found.get((place, phase))
            if entry is None:
                assert cells == ["not seen", ""]
                continue
            keys = ("r", "own_r", "max_ulp", "max_abs", "rel_l2", "mean_abs", "cosine")
            for key, cell in zip(keys, cells, strict=True):
                if entry[key] is None:
                    assert cell == "-"
                else:
                    value = float(cell.removeprefix("✗ ").split(" / ")[0])
                    assert value == pytest.approx(float(entry[key]), rel=0.05, nan_ok=True)
            failing = failing or not entry["ok"]
            beyond = [not float(entry[key] or 0) <= bound for key, bound in (("r", 1.8), ("own_r", 1.3))]
            assert [cell.startswith("✗") for cell in cells] == [*beyond, *[False] * 5]
        assert row[0].startswith("✗") == failing


@pytest.mark.parametrize("width", [800, 1280])
def test_the_head_of_the_table_stays_in_sight(width, browser, show):
    show("failed", width=width)
    browser.evaluate("document.getElementById('layers.20.q').scrollIntoView({block: 'center'})")
    assert browser.evaluate("document.querySelector('thead').getBoundingClientRect().top") == 0
    # each phase above its own columns, of which a narrow screen has fewer
    lefts = "[...document.querySelectorAll('th.r')].map((x) => x.getBoundingClientRect().left)"
    prefill, decode, first, second = browser.evaluate(lefts)
    assert (prefill, decode) == (first, second)
    columns = browser.evaluate(
        "[...document.querySelectorAll('#layers\\\\.20\\\\.q td')].map((x) => x.offsetWidth > 0)"
    )
    assert sum(columns) == (10 if width == 800 else 14)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_strip_has_a_pixel_for_each_place_and_position(theme, browser, show):
    """Read back by the browser. What was not seen is transparent, NaN and infinity black or white, and from R 1 on the
    lightness goes one way: away from the background."""
    report = show("not finite", theme=theme)
    browser.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    pixels = """((image) => {
      const context = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
      const size = [image.naturalWidth, image.naturalHeight];
      const drawing = context.getContext("2d");
      drawing.drawImage(image, 0, 0, ...size);
      return [size, [...drawing.getImageData(0, 0, ...size).data]];
    })"""
    for row in range(2):
        size, data = browser.evaluate(f"{pixels}(document.images[{row}])")
        values = [rows[row] for rows in report["strip"]["r"]]
        assert size == [len(values), len(values[0])]
        shown = []
        for index in range(0, len(data), 4):
            position, place = divmod(index // 4, len(values))
            r, (red, green, blue, alpha) = values[place][position], data[index : index + 4]
            assert (alpha == 0) == (r is None)
            if r is None:
                continue
            if not math.isfinite(float(r)):
                assert [red, green, blue] == ([255] * 3 if theme == "dark" else [0] * 3)
            elif 1 <= r <= 64:
                shown.append((r, 0.2126 * red + 0.7152 * green + 0.0722 * blue))
        lightness = [y for _, y in sorted(shown)]
        assert len(lightness) > 100
        assert lightness == sorted(lightness, reverse=theme == "light")


@pytest.mark.parametrize("name", ["failed", "large"])
def test_a_strip_has_a_line_between_prefill_and_decode_and_marks_the_first_place(name, browser, show):
    report = show(name)
    for row, text in enumerate(report["texts"]):
        prompt, positions = text["prompt_tokens"], len(report["strip"]["r"][0][row])
        strip = f"document.querySelector('[data-panel=\"{row}\"]')"
        box = browser.evaluate(f"{strip}.getBoundingClientRect().toJSON()")
        line = browser.evaluate(f"{strip}.querySelector('line').getBoundingClientRect().toJSON()")
        assert (line["y"] - box["y"]) / box["height"] == pytest.approx(prompt / positions, abs=1e-3)
        labels = browser.evaluate(f"[...{strip}.querySelectorAll('text')].map((x) => x.textContent)")
        assert labels == [f"prefill 0-{prompt - 1}", f"decode {prompt}-{positions - 1}"]
        assert box["height"] >= positions  # no position is lost
        rings = browser.evaluate(
            f"[...{strip}.querySelectorAll('circle')].map((x) => x.getBoundingClientRect().toJSON())"
        )
        if row != report["first"]["row"]:
            assert rings == []
            continue
        place, position = report["strip"]["places"].index(report["first"]["place"]), report["first"]["position"]
        x = (rings[0]["x"] + rings[0]["width"] / 2 - box["x"]) / box["width"] * len(report["strip"]["places"])
        y = (rings[0]["y"] + rings[0]["height"] / 2 - box["y"]) / box["height"] * positions
        assert (x, y) == pytest.approx((place + 0.5, position + 0.5), abs=0.1)


@pytest.mark.parametrize("width", [800, 1280])
def test_the_pointer_reads_place_position_and_r(width, browser, show):
    report = show("large", width=width)
    names, r = report["strip"]["places"], report["strip"]["r"]

    def point(panel: object, x: float, y: float) -> str:
        """What the tip says at a point of a panel, in shares of its width and height."""
        return browser.evaluate(f"""((panel) => {{
          const box = panel.getBoundingClientRect();
          const at = {{clientX: box.left + {x} * box.width, clientY: box.top + {y} * box.height}};
          panel.dispatchEvent(new PointerEvent("pointermove", at));
          return document.getElementById("tip").innerText;
        }})(document.querySelector('[data-panel="{panel}"]'))""")

    for place, position, phase in ((0, 0, "prefill"), (5, 511, "prefill"), (120, 512, "decode"), (226, 599, "decode")):
        tip = point(0, (place + 0.5) / 227, (position + 0.5) / 600).split("\n")
        assert tip[:2] == [names[place], f"position {position}, {phase}"]
        assert float(tip[2].removeprefix("R ")) == pytest.approx(r[place][0][position], rel=0.01)
    assert names[2] in report["not_seen"]
    assert point(0, 2.5 / 227, 599.5 / 600).split("\n")[2] == "R not seen"
    entry = report["places"][100]
    lines = [names[100], "prefill", f"R {entry['r']:.2f} (bound 1.80)", f"own R {entry['own_r']:.2f} (bound 1.30)"]
    assert point("prefill", 100.5 / 227, 0.5).split("\n") == lines
    browser.evaluate("document.querySelector('[data-panel=\"prefill\"]').dispatchEvent(new Event('pointerleave'))")
    assert browser.evaluate("document.getElementById('tip').hidden")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_plot_is_logarithmic_and_marks_what_is_out_of_bounds(phase, browser, show):
    report = show("failed")
    names = report["strip"]["places"]
    plot = f"document.querySelector('[data-panel=\"{phase}\"]')"
    ticks = browser.evaluate(f"[...{plot}.querySelectorAll('.grid, .one')].map((x) => x.y1.baseVal.value)")
    labels = browser.evaluate(f"[...{plot}.querySelectorAll('.grid + text, .one + text')].map((x) => x.textContent)")
    assert labels == ["0.5", "1", "2", "5", "10", "20", "50"]
    slope = (ticks[-1] - ticks[0]) / math.log(100)

    def own_r(y: float) -> float:
        return math.exp((y - ticks[1]) / slope)

    entries = [entry for entry in report["places"] if entry["phase"] == phase]
    dots = browser.evaluate(
        f"[...{plot}.querySelectorAll('circle')].map((x) => [x.getAttribute('cx'), x.cy.baseVal.value])"
    )
    inside = [entry for entry in entries if entry["own_r"] <= 1.3]
    for entry, (x, y) in zip(inside, dots, strict=True):
        assert float(x.rstrip("%")) / 100 * len(names) == pytest.approx(names.index(entry["place"]) + 0.5, abs=0.01)
        assert own_r(y) == pytest.approx(entry["own_r"], rel=0.01)
    crosses = browser.evaluate(f"{plot}.querySelectorAll('.out').length")
    assert crosses == sum((entry["r"] > 1.8) + (entry["own_r"] > 1.3) for entry in entries)
    text = browser.evaluate(f"{plot}.textContent")
    assert ("first out of bounds: layers.3.heads" in text) == (phase == "decode")


@pytest.mark.parametrize("width", [800, 1280])
def test_foreign_text_stays_text(width, browser, show):
    report = show("foreign", width=width)
    assert browser.evaluate("document.title").startswith("Audit of ./weights, tp 2, cpu<script>")
    assert browser.evaluate("document.scripts.length") == 2
    assert (
        browser.evaluate("JSON.parse(document.getElementById('data').textContent).places") == report["strip"]["places"]
    )
    shown = [report["verdict"], report["command"], *report["next"], *report["not_seen"], *report["strip"]["places"]]
    shown += [value for value in report["setting"].values() if isinstance(value, str)]
    shown += [*report["causes"][0].values(), report["first"]["place"], report["first"]["module"]]
    shown += [report["bounds"][0]["places"], report["logits"]["nxdi"]["note"]]
    assert all(text.endswith(FOREIGN) for text in shown)
    body = browser.evaluate("document.body.innerText")
    assert [text for text in shown if text not in body] == []


def test_logits_next_steps_and_the_command_are_on_the_page(browser, show):
    report = show("failed")
    text = browser.evaluate("document.getElementById('Logits').innerText")
    for fact in ("81.25%", "row 0, position 12", "0.31", "1.3e-5", "✗ Fails the rule of NxDI: largest error 0.31 of"):
        assert fact in text
    assert "✓ Passes the rule of vLLM Neuron: largest error 0.011 of 0.05" in text
    steps = browser.evaluate("[...document.querySelectorAll('#What-to-look-at-next li')].map((x) => x.innerText)")
    assert steps == report["next"]
    # one click selects all of it
    browser.driver.find_element("css selector", "pre").click()
    assert browser.evaluate("getSelection().toString()") == report["command"]
    assert browser.evaluate("document.getElementById('Not-seen').innerText").count("layers.") == 60


def test_a_first_place_that_was_not_captured_is_named_and_not_marked(tmp_path):
    """Such as a copy of a head that differs, of which the capture says no more."""
    pytest.importorskip("matplotlib")
    report = failed(layers=6)
    report["first"]["place"] = "layers.3.k_proj"
    assert "layers.3.k_proj" in page(report)
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


@pytest.mark.parametrize("name", REPORTS)
def test_the_picture_is_drawn_of_every_report(name, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    plot(REPORTS[name](), tmp_path / "plot.png")
    pixels = image.imread(tmp_path / "plot.png")[..., :3]  # H W 3
    height, width, _ = pixels.shape
    assert (width, height) == (1210, 660)
    assert (tmp_path / "plot.png").stat().st_size < 200_000
    red = (pixels[..., 0] > pixels[..., 1] + 0.3) & (pixels[..., 0] > pixels[..., 2] + 0.3)
    line = red.sum(0).max() > 150  # at the first place out of bounds
    assert line == (name not in ("passed", "bitwise"))
