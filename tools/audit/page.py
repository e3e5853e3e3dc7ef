"""The report of an audit as one HTML page, and its divergence by layer as a picture.

`tools.audit` makes the report and says what its keys mean. The page is one file without network or fonts of its own,
and its script only answers the pointer. Strips and plots share their horizontal axis: the places, in data order.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from base64 import b64encode
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

PHASES = ("prefill", "decode")
BOUNDS = {"r": "r_bound", "own_r": "own_bound"}
LABELS = {"r": "R", "own_r": "own R", "max_ulp": "max ulp", "max_abs": "max abs", "rel_l2": "rel L2"}
LABELS |= {"mean_abs": "mean abs", "cosine": "cosine"}  # a narrow screen does not show these two
PLOT_HEIGHT = 150  # pixels, as all heights below

# The colour of R goes by its logarithm to base 2, from 1/8 to 64: pale at 1, blue below. Above, lightness alone tells
# how far, so that it can be read without seeing colours.
SCALE = {
    "light": {-3: "2a6fb0", 0: "eceae6", 1: "f7b267", 3: "d9601a", 6: "7a1f05"},
    "dark": {-3: "5aa7e8", 0: "2b3036", 1: "8a4b12", 3: "e0791f", 6: "ffc46b"},
}
BROKEN = {"light": "000000", "dark": "ffffff"}  # NaN and infinity
LOW, HIGH, LEVELS = -3, 6, 254

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const cell = (offset, size, count) => Math.max(0, Math.min(count - 1, Math.floor(offset / size * count)));
for (const panel of document.querySelectorAll("[data-panel]")) {
  panel.addEventListener("pointermove", (event) => {
    const box = panel.getBoundingClientRect();
    const place = cell(event.clientX - box.left, box.width, data.places.length);
    let lines = data.plots[panel.dataset.panel];
    if (lines) {
      lines = lines[place];
    } else {
      const text = data.texts[panel.dataset.panel];
      const position = cell(event.clientY - box.top, box.height, text.r[place].length);
      const phase = position < text.prompt_tokens ? "prefill" : "decode";
      lines = `position ${position}, ${phase}\\nR ${text.r[place][position]}`;
    }
    tip.textContent = data.places[place] + "\\n" + lines;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  panel.addEventListener("pointerleave", () => { tip.hidden = true; });
}
"""


# ---- the report by place


def entries(report: dict, phase: str) -> list[dict]:
    """The phase's entry of each place of the strip, which names them all; empty if it was not seen."""
    found = {entry["place"]: entry for entry in report["places"] if entry["phase"] == phase}
    return [found.get(name, {}) for name in report["strip"]["places"]]


def layer_of(name: str) -> str:
    """The layer's number in a place's name; "" outside of layers."""
    parts = name.split(".")
    return parts[1] if parts[0] == "layers" else ""


def layer_starts(names: list[str]) -> dict[str, int]:
    """Layers to mark on the horizontal axis, at most 16, and where they start."""
    starts = {}
    for index, name in enumerate(names):
        starts.setdefault(layer_of(name), index)
    starts.pop("", None)
    return dict([*starts.items()][:: math.ceil(len(starts) / 16) or 1])


def out_of_bounds(entry: dict, key: str) -> bool:
    """Whether R or own R is beyond its bound, as NaN is."""
    value, bound = entry.get(key), entry.get(BOUNDS.get(key))
    return value is not None and bound is not None and not float(value) <= float(bound)


def axis_limits(report: dict) -> tuple[float, float]:
    """The ends of the plots' axis: every finite value and bound is between them, and so are 0.5 and 2."""
    shown = [0.5, 2.0]
    for entry in report["places"]:
        for key in (*BOUNDS.keys(), *BOUNDS.values()):
            value = float(entry[key] or 0)
            if 0 < value < math.inf:
                shown.append(value)
    return min(shown) / 1.3, max(shown) * 1.3


def curve(places: list[dict], key: str, limits: tuple[float, float]) -> list[float]:
    """What is drawn of a key: NaN and infinity at the top, 0 at the bottom, and nothing (NaN) if there is no value."""
    low, high = limits
    drawn = []
    for entry in places:
        value = entry.get(key)
        if value is None:
            drawn.append(math.nan)
        elif math.isfinite(float(value)):
            drawn.append(max(low, float(value)))
        else:
            drawn.append(high)
    return drawn


# ---- words and numbers


def words(value: object) -> str:
    """Any value of the report, as text in HTML."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{words(key)} {words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(words, value))
    return escape(str(value))


def number(value: float | str | None, key: str = "r") -> str:
    """About three digits; a dash if there is no value."""
    if value is None:
        return "-"
    value = float(value)
    if key == "cosine":
        return f"{value:.5f}"
    if value == 0 or key == "max_ulp":  # often a whole number
        return f"{value:.4g}"
    if 0.1 <= abs(value) < 10000:
        return f"{value:.{2 if abs(value) < 100 else 0}f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%"


def pairs(items: dict[str, str]) -> str:
    """Names and their values, which are HTML already."""
    rows = [f"<div><dt>{words(name)}</dt><dd>{value}</dd></div>" for name, value in items.items()]
    return f"<dl>{''.join(rows)}</dl>"


def bullets(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


# ---- parts of the page


def verdict(report: dict) -> str:
    kind, state = "good", "✓ Passed"
    if not report["passed"]:
        kind, state = "bad", "✗ Failed"
    elif report["bitwise"]:
        state = "✓ Bitwise equal"
    parts = [f"<h1>{state}</h1><p>{words(report['verdict'])}</p>"]
    first = report["first"]
    if first:
        step = f", step {words(first['step'])}" if first["phase"] == "decode" else ""
        facts = {
            "first place out of bounds": f'<a href="#{words(first["place"])}">{words(first["place"])}</a>',
            "layer": words(first["layer"]),
            "module": words(first["module"]),
            "phase": words(first["phase"]) + step,
            "position": f"{words(first['position'])} of text {words(first['row'])}",
            "heads": words(first["heads"]) or "not confined to some",
            "ranks": words(first["ranks"]) or "not confined to some",
        }
        parts.append(pairs(facts))
        if not report["causes"]:
            parts.append("<p>It looks like none of the known causes.</p>")
    for cause in report["causes"]:
        parts.append(f"<h2>Cause: {words(cause['name'])}</h2><p>{words(cause['meaning'])}</p>")
        parts.append(f"<p><b>Evidence:</b> {words(cause['evidence'])}</p>")
    return f'<header class="{kind}">{"".join(parts)}</header>'


def layer_axis(names: list[str]) -> str:
    marks = ['<text x="-8" y="13" class="end">layer</text>']
    for layer, index in layer_starts(names).items():
        x = percent(index, len(names))
        marks.append(f'<line x1="{x}" x2="{x}" y2="5"/><text x="{x}" y="13" dx="3">{words(layer)}</text>')
    return f'<svg class="axis" height="18">{"".join(marks)}</svg>'


def palette(theme: str) -> bytes:
    """256 colours: of what was not seen, of NaN and infinity, and the scale."""
    colors = bytes(3) + bytes.fromhex(BROKEN[theme])
    stops = {exponent: bytes.fromhex(color) for exponent, color in SCALE[theme].items()}
    for level in range(LEVELS):
        exponent = LOW + (HIGH - LOW) * level / (LEVELS - 1)
        start, end = next(between for between in pairwise(stops) if exponent <= between[1])
        share = (exponent - start) / (end - start)
        colors += bytes(round(a + share * (b - a)) for a, b in zip(stops[start], stops[end], strict=True))
    return colors


def color_number(r: float | str | None) -> int:
    """Which colour of `palette` R has."""
    if r is None:
        return 0
    if not math.isfinite(float(r)):
        return 1
    exponent = math.log2(min(2**HIGH, max(2**LOW, float(r))))
    return 2 + round((LEVELS - 1) * (exponent - LOW) / (HIGH - LOW))


def png(lines: list[bytes], theme: str) -> str:
    """An image of one byte a pixel as a data URI; colour 0 is transparent. The format is https://www.w3.org/TR/png-3/"""
    size = struct.pack(">II", len(lines[0]), len(lines))
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines), 9)
    file = b"\x89PNG\r\n\x1a\n"
    chunks = {b"IHDR": size + b"\x08\x03\0\0\0", b"PLTE": palette(theme), b"tRNS": b"\0", b"IDAT": pixels, b"IEND": b""}
    for kind, content in chunks.items():
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return f"data:image/png;base64,{b64encode(file).decode()}"


def strip(report: dict, row: int) -> str:
    """R of one text as an image, a pixel for each place and position."""
    names, first = report["strip"]["places"], report["first"]
    values = [texts[row] for texts in report["strip"]["r"]]
    prompt, positions = report["texts"][row]["prompt_tokens"], len(values[0])
    lines = [bytes(map(color_number, position)) for position in zip(*values, strict=True)]
    height = positions * max(1, min(14, 160 // positions))
    end = height * prompt / positions
    marks = f"""<line x1="-110" x2="100%" y1="{end}" y2="{end}"/>
<text x="-8" y="{end - 5}" class="end">prefill 0-{prompt - 1}</text>"""
    if prompt < positions:
        marks += f'<text x="-8" y="{end + 13}" class="end">decode {prompt}-{positions - 1}</text>'
    if first and first["row"] == row and first["place"] in names:  # it may be one that was not captured
        x, y = percent(names.index(first["place"]) + 0.5, len(names)), height * (first["position"] + 0.5) / positions
        marks += f'<circle class="halo" cx="{x}" cy="{y}" r="7"/><circle cx="{x}" cy="{y}" r="7"/>'
    return f"""<figure><h3>Text {row}: {prompt} prompt tokens, {positions} positions</h3>
<div class="strip" style="height:{height}px" data-panel="{row}"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{png(lines, "dark")}">
<img src="{png(lines, "light")}" alt="R at each place and position"></picture>
<svg>{marks}</svg></div>{layer_axis(names)}</figure>"""


def strips(report: dict) -> str:
    ticks = ""
    for exponent in range(LOW, HIGH + 1):
        value = str(2**exponent) if exponent >= 0 else f"1/{2**-exponent}"
        ticks += f'<i style="left:{percent(exponent - LOW, HIGH - LOW)}">{value}</i>'
    meaning = f"""<p>R is the subject's distance from HF computed exactly, divided by that of HF in the audited dtype.
It is near 1 if the subject rounds as HF does.</p><div class="legend"><span>R</span><div class="scale">{ticks}</div>
<span><b class="broken"></b>NaN or infinite</span><span><b class="hatch"></b>not seen</span>
<span><b class="ring"></b>first out of bounds</span></div>"""
    return meaning + "".join(strip(report, row) for row in range(len(report["texts"])))


def axis_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 and so on; if the axis is long, at most 8 powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    if len(decades) > 3:
        ticks = [10.0**decade for decade in decades[:: math.ceil(len(decades) / 8)]]
    return [tick for tick in ticks if low <= tick <= high]


def path(heights: list[float], steps: bool) -> str:
    """SVG path data, a place being 1 wide: a line, or level steps. It breaks at NaN."""
    data, pen = "", "M"
    for index, y in enumerate(heights):
        if math.isnan(y):
            pen = "M"
            continue
        data += f"{pen}{index} {y:.1f}h1" if steps else f"{pen}{index + 0.5} {y:.1f}h0"  # h0: a dot if it is alone
        pen = "L"
    return data


def phase_plot(report: dict, phase: str) -> str:
    """R and own R of each place."""
    names, places, limits = report["strip"]["places"], entries(report, phase), axis_limits(report)
    low, high = limits

    def height(value: float) -> float:
        return PLOT_HEIGHT * math.log(high / value) / math.log(high / low)

    grid, lines, marks = "", "", ""
    for tick in axis_ticks(low, high):
        y = height(tick)
        grid += f'<line class="{"one" if tick == 1 else "grid"}" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
        grid += f'<text x="-8" y="{y + 4:.1f}" class="end">{tick:g}</text>'
    for key, bound in BOUNDS.items():
        heights = [height(value) for value in curve(places, key, limits)]
        bounds = [height(value) for value in curve(places, bound, limits)]
        lines += f'<path class="{key} bound" d="{path(bounds, steps=True)}"/>'
        if key == "r":
            lines += f'<path class="r" d="{path(heights, steps=False)}"/>'
        for index, y in enumerate(heights):
            x = percent(index + 0.5, len(names))
            if out_of_bounds(places[index], key):
                marks += f'<text class="out" x="{x}" y="{y + 5:.1f}">\N{MULTIPLICATION SIGN}</text>'
            elif key == "own_r" and not math.isnan(y):
                marks += f'<circle class="own_r" cx="{x}" cy="{y:.1f}" r="2"/>'
    first = report["first"]
    if first and first["phase"] == phase and first["place"] in names:
        index = names.index(first["place"])
        x, side = percent(index + 0.5, len(names)), "end" if 2 * index > len(names) else "start"
        marks += f'<line class="first" x1="{x}" x2="{x}" y1="-14" y2="100%"/>'
        marks += f'<text class="{side}" x="{x}" y="-6">&nbsp;first out of bounds: {words(first["place"])}&nbsp;</text>'
    return f"""<figure><h3>{phase}</h3><svg class="plot" height="{PLOT_HEIGHT}" data-panel="{phase}">{grid}
<svg viewBox="0 0 {len(names)} {PLOT_HEIGHT}" height="{PLOT_HEIGHT}" preserveAspectRatio="none">{lines}</svg>{marks}
</svg>{layer_axis(names)}</figure>"""


def plots(report: dict) -> str:
    meaning = """<p>Own R is R of one step alone: the place is computed again, exactly, from the subject's own inputs to
that step, so an error made earlier does not count. NaN and infinity are drawn at the top.</p>
<p class="legend"><span class="r">━ R</span><span class="own_r">● own R</span><span class="r">┅ bound of R</span>
<span class="own_r">┅ bound of own R</span><span class="out">\N{MULTIPLICATION SIGN} out of bounds</span></p>"""
    return meaning + "".join(phase_plot(report, phase) for phase in PHASES)


def cells(entry: dict) -> str:
    """A place in one phase: its part of a row of the table."""
    if not entry:
        return '<td class="r unseen" colspan="5">not seen</td><td class="cosine" colspan="2"></td>'
    row, state = "", "" if entry["ok"] else "bad"
    for key in LABELS:
        shown, kind = number(entry[key], key), f"{key} {state}"
        if out_of_bounds(entry, key):
            kind += " out"
            shown = f"✗ {shown}<span> / {number(entry[BOUNDS[key]])}</span>"
        row += f'<td class="{kind}">{shown}</td>'
    return row


def table(report: dict) -> str:
    names, (prefill, decode) = report["strip"]["places"], [entries(report, phase) for phase in PHASES]
    top = [f'<th class="r" colspan="5">{phase}</th><th class="cosine" colspan="2"></th>' for phase in PHASES]
    labels = [f'<th class="{key}">{label}</th>' for key, label in LABELS.items()]
    rows = f'<thead><tr><th rowspan="2">place</th>{"".join(top)}</tr><tr>{"".join(labels * 2)}</tr></thead>'
    for _, layer in groupby(zip(names, prefill, decode, strict=True), key=lambda row: layer_of(row[0])):
        rows += "<tbody>"
        for name, first, second in layer:
            state = "" if first.get("ok", True) and second.get("ok", True) else "✗ "
            rows += f'<tr id="{words(name)}"><th>{state}{words(name)}</th>{cells(first)}{cells(second)}</tr>'
        rows += "</tbody>"
    given = []
    for bound in report["bounds"]:
        limit = f"R and own R up to {number(bound['r'])} and room for scatter"
        given.append(f"<code>{words(bound['places'])}</code>: {limit}, as given by --bound")
    failed = [sum(not entry.get("ok", True) for entry in places) for places in (prefill, decode)]
    count = f"Of {len(names)} places {failed[0]} are out of bounds in prefill and {failed[1]} in decode, marked ✗."
    return f"<p>{count}</p>{bullets(given)}<table>{rows}</table>"


def kinds(report: dict) -> str:
    """own R of all layers together, and the shares of other roundings."""
    facts = {}
    for entry in report["kinds"]:
        state = "" if entry["ok"] else "✗ "
        value = f"{state}{number(entry['own_r'])}, up to {number(entry['own_bound'])}"
        if "share" in entry:
            value += f"; {words(entry['of'])}: share {entry['share']:.2f} ± {entry['share_error']:.2f}"
        facts[entry["kind"]] = value
    about = "The largest errors count as five times HF's median, so that a few huge activations do not decide."
    return f"<p>{about}</p>{pairs(facts)}"


def logits(report: dict) -> str:
    found = report["logits"]
    if found is None:
        return "<p>They were not seen.</p>"
    facts = {
        "positions": words(found["positions"]),
        "same first choice": f"{found['top1_agreement']:.2%}",
        "first other choice": words(found["first_other"]),
        "mean KL": number(found["mean_kl"]),
        "largest KL": number(found["max_kl"]),
        "mean KL of HF in the audited dtype": number(found["hf_mean_kl"]),
    }
    rules = []
    for key, name in {"nxdi": "NxDI", "vllm_neuron": "vLLM Neuron"}.items():
        state = "✓ Passes" if found[key]["passed"] else "✗ Fails"
        rules.append(f"{state} the rule of {name}: {words(found[key]['note'])}")
    return pairs(facts) + bullets(rules)


# ---- the page and the picture


def hover_data(report: dict) -> str:
    """What the script shows of each point of strips and plots: JSON that cannot end its element."""
    data = {"places": report["strip"]["places"], "texts": [], "plots": {}}
    for row, text in enumerate(report["texts"]):
        r = []
        for texts in report["strip"]["r"]:
            r.append(["not seen" if value is None else number(value) for value in texts[row]])
        data["texts"].append({"prompt_tokens": text["prompt_tokens"], "r": r})
    for phase in PHASES:
        lines = []
        for entry in entries(report, phase):
            line = phase if entry else f"{phase}: not seen"
            for key, bound in BOUNDS.items():
                if entry:
                    line += f"\n{LABELS[key]} {number(entry[key])} (bound {number(entry[bound])})"
            lines.append(line)
        data["plots"][phase] = lines
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def page(report: dict) -> str:
    """The report as an HTML page. Whatever comes from the report is escaped."""
    unseen = ", ".join(f"<code>{words(name)}</code>" for name in report["not_seen"])
    names = {"hf": "HF", "dtype": "audited dtype", "exact": "exact dtype", "peak_gb": "peak GB"}
    sections = {
        "Setting": pairs({names.get(key, key): words(value) for key, value in report["setting"].items()}),
        "R by place and position": strips(report),
        "Divergence by layer": plots(report),
        "Own R of all layers together": kinds(report),
        "Places": table(report),
        "Not seen": f"<p>{unseen or 'Every place was seen.'}</p>",
        "Logits": logits(report),
        "What to look at next": bullets(map(words, report["next"])),
        "Repeat": f"<pre>{words(report['command'])}</pre>",
    }
    links, body = "", ""
    for title, content in sections.items():
        anchor = title.replace(" ", "-")
        links += f'<a href="#{anchor}">{title}</a>'
        body += f'<section id="{anchor}"><h2>{title}</h2>{content}</section>'
    style = Path(__file__).with_suffix(".css").read_text()
    for theme, stops in SCALE.items():
        gradient = [f"#{color} {percent(exponent - LOW, HIGH - LOW)}" for exponent, color in stops.items()]
        style = style.replace(f"{theme.upper()}_SCALE", ", ".join(gradient))
    title = f"Audit of {words(report['setting']['subject'])} against HF, {words(report['setting']['hf'])}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head><body><nav><b>{title}</b>{links}</nav>{verdict(report)}{body}<div id="tip" hidden></div>
<script type="application/json" id="data">{hover_data(report)}</script><script>{SCRIPT}</script></body></html>"""


def plot(report: dict, file: Path) -> None:
    """Writes a PNG: R and own R of each place by layer, in prefill and in decode, with their bounds."""
    from matplotlib.figure import Figure

    names, limits, first = report["strip"]["places"], axis_limits(report), report["first"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(report["verdict"], wrap=True, parse_math=False)
    for axes, phase in zip(figure.subplots(2, sharex=True, sharey=True), PHASES, strict=True):
        places = entries(report, phase)
        for (key, bound), color, style in zip(BOUNDS.items(), ("#0b5cad", "#9a4a06"), ("-", "."), strict=True):
            values = curve(places, key, limits)
            bounds = curve(places, bound, limits)
            failed = [index for index, entry in enumerate(places) if out_of_bounds(entry, key)]
            axes.plot(values, style, color=color, label=LABELS[key])
            axes.step(range(len(names)), bounds, "--", color=color, where="mid", label=f"bound of {LABELS[key]}")
            axes.plot(failed, [values[index] for index in failed], "x", color="#b42318", label="out of bounds")
        if first and first["phase"] == phase and first["place"] in names:
            index = names.index(first["place"])
            side = "right" if 2 * index > len(names) else "left"
            above = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": side, "parse_math": False}
            axes.axvline(index, color="#b42318", linewidth=1)
            axes.text(index, 1, f"first out of bounds: {first['place']}", **above)
        axes.axhline(1, color="gray", linewidth=1, zorder=0)
        axes.set(yscale="log", ylim=limits, ylabel=f"R in {phase}")
    ticks, starts = axis_ticks(*limits), layer_starts(names)
    axes.set_yticks([], minor=True)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([*starts.values()], [*starts.keys()])
    axes.set_xlabel("layer")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=5)
    figure.savefig(file, dpi=110, format="png")
