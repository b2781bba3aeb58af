"""What is cut or overlaps on an HTML page, measured in headless Chromium at several widths and as it is printed."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

PAPER = 718
"""Pixels between the margins of an A4 page."""
SCREENS = (400, 800, 1280)
_MEASURE = r"""
const SLACK = 1.5;
const MARKED = '.track, .row, .ticks';  // what marks their ends stands half outside
const name = node => node.tagName.toLowerCase() + (node.getAttribute('class') ? '.' + node.getAttribute('class') : '');
const shown = text => JSON.stringify(text.trim().replace(/\s+/g, ' ').slice(0, 60));
function print(page) {
  for (const sheet of page.styleSheets) for (const rule of sheet.cssRules)
    if (rule instanceof page.defaultView.CSSMediaRule) {
      if (rule.conditionText === 'print') rule.media.mediaText = 'all';
      else if (rule.conditionText.startsWith('screen')) rule.media.mediaText = 'not all';
    }
}
function measure(page, printed) {
  const found = new Set(), width = page.documentElement.clientWidth, boxes = [];
  for (const node of page.body.querySelectorAll('*')) {
    const style = page.defaultView.getComputedStyle(node);
    if (node.closest('svg') || style.display === 'inline' || !node.checkVisibility()) continue;
    if (node.scrollWidth > node.clientWidth + SLACK && node.clientWidth && !node.matches(MARKED))
      found.add(`${name(node)} is ${node.scrollWidth - node.clientWidth} px too wide: ${shown(node.textContent)}`);
    if (style.overflowY !== 'visible' && node.scrollHeight > node.clientHeight + SLACK)
      found.add(`${name(node)} is ${node.scrollHeight - node.clientHeight} px too high: ${shown(node.textContent)}`);
  }
  const walker = page.createTreeWalker(page.body, 4);
  while (walker.nextNode()) {
    const text = walker.currentNode, node = text.parentElement;
    if (!text.data.trim() || ['title', 'style', 'script'].includes(node.tagName.toLowerCase())) continue;
    if (!node.checkVisibility()) {
      if (printed && node.closest('details') && !node.closest('tr.head')) found.add(`not printed: ${shown(text.data)}`);
      continue;
    }
    const range = page.createRange(), svg = node.closest('svg');
    range.selectNodeContents(text);
    for (const box of range.getClientRects()) {
      const frame = svg ? svg.getBoundingClientRect() : {left: 0, right: width, top: -1e9, bottom: 1e9};
      if (box.left < frame.left - SLACK || box.right > frame.right + SLACK || box.top < frame.top - SLACK ||
          box.bottom > frame.bottom + SLACK) found.add(`cut: ${shown(text.data)} in ${name(svg || node)}`);
      boxes.push({box, node, text: text.data, svg});
    }
  }
  for (const mark of page.body.querySelectorAll('.track u, .row u'))
    boxes.push({box: mark.getBoundingClientRect(), node: mark, text: 'a dot', svg: null});
  boxes.sort((a, b) => a.box.top - b.box.top);
  boxes.forEach((a, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j].box.top < a.box.bottom - SLACK; j++) {
      const b = boxes[j];
      if (a.node === b.node || (a.text === 'a dot' && b.text === 'a dot')) continue;
      const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      // lines of SVG text are set closer than the boxes of their fonts are high
      const least = a.svg || b.svg ? 4 : SLACK;
      if (wide > SLACK && high > least) found.add(`overlap: ${shown(a.text)} and ${shown(b.text)}`);
    }
  });
  return {width, texts: boxes.length, found: [...found]};
}
addEventListener('load', () => {
  const frames = [...document.querySelectorAll('iframe')].map(frame => {
    if (frame.dataset.print) print(frame.contentDocument);
    return [frame.id, measure(frame.contentDocument, frame.dataset.print)];
  });
  document.querySelector('#findings').textContent = JSON.stringify(Object.fromEntries(frames));
});
"""


def browser():
    """Chromium's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here (Debian's package `chromium`): layouts are not measured")
    return found


def wheres(name):
    """The keys of a page's findings."""
    return [*(f"{name} at {width}" for width in SCREENS), f"{name} in print"]


def measure(pages, folder):
    """Findings of each page by `wheres(NAME)`; one start of the browser for all of them."""
    shown = [(width, "") for width in SCREENS] + [(PAPER, "data-print=1")]
    frames = [
        f'<iframe id="{where}" style="border:0;width:{width}px" {printed} srcdoc="{escape(page)}"></iframe>'
        for name, page in pages.items()
        for where, (width, printed) in zip(wheres(name), shown, strict=True)
    ]
    harness = folder / "harness.html"
    head = "<!doctype html><meta charset=utf-8><pre id=findings></pre>"
    harness.write_text(f"{head}{''.join(frames)}<script>{_MEASURE}</script>")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    command = [browser(), *options, f"--user-data-dir={folder}/profile", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    findings = json.loads(unescape(re.search(r'<pre id="findings">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert len(findings) == len(frames)
    assert all(one["texts"] for one in findings.values())
    return {name: one["found"] for name, one in findings.items()}
