import dataclasses
import re
import shutil
import subprocess

import numpy as np
import pytest

from diffjax.data import image_io
from diffjax.evaluation import frontier, report


def test_page_is_complete_and_alone(quality_row, tmp_path):
    frontier.plot([quality_row], tmp_path / "plot.svg")
    (tmp_path / "a.png").write_bytes(b"\x89PNG picture")
    row = dataclasses.replace(quality_row, reference='<b>"a" & b')
    html = report.page(
        "A <title>", "All", (tmp_path / "plot.svg").read_text(), [row], [tmp_path / "a.png"]
    )
    assert "<b>" not in html
    assert "&lt;b&gt;&quot;a&quot; &amp; b" in html
    assert "data:image/png;base64,iVBORyBwaWN0dXJl" in html
    assert html.count("<svg") == 1
    asked = re.findall(r'(?:src|href|url)[=(]\s*"?([^")\s]+)', html)
    assert len(asked) > 3
    assert all(text.startswith(("#", "data:image/png;base64,")) for text in asked), asked


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page")
def test_page_in_a_browser(quality_row, tmp_path):
    frontier.plot([quality_row], tmp_path / "plot.svg")
    image_io.save_png(tmp_path / "a.png", image_io.grid(np.zeros((2, 8, 8, 1), np.uint8)))
    page = report.page(
        "Title",
        "All",
        (tmp_path / "plot.svg").read_text(),
        [quality_row] * 3,
        [tmp_path / "a.png"] * 3,
    )
    # The rows after a click on the head of the last column, and whether the images can be read.
    look = """<script>document.querySelector("th:last-child").click();
        const data = document.body.dataset, images = [...document.images];
        data.rows = document.querySelectorAll("tbody tr").length;
        data.width = images.map(image => image.naturalWidth > 0)</script>"""
    (tmp_path / "report.html").write_text(page.replace("</body>", f"{look}</body>"))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{tmp_path}/report.html",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-rows="3"' in shown
    assert 'data-width="true,true,true"' in shown
    assert 'data-up="1"' in shown
