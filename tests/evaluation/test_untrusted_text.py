"""Names that come from files, on the terminal, in Markdown, YAML, CSV and pages."""

import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from samed_peft.adapters.card import model_card
from samed_peft.config import SamedConfig
from samed_peft.evaluation import evaluate_cases, format_table
from samed_peft.evaluation.artefacts import csv_text, write_report
from samed_peft.evaluation.tables import markdown_text

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil/x.png)",
    "[liver](javascript:alert(1))",
    "<http://evil>",
    "http://evil.example",
    "www.evil.example",
    "a | b",
    "a\n---\nlicense: evil\n---\n# b",
    "a\r\n\r\n<b>",
    "`</code>` x",
    "**bold** ~~gone~~ &lt;b&gt; $x$",
    "\x1b[31mred\x1b]0;title\x07",
    "right\u202etfel",
    "\u2028line\x85line\x9b31m",
    '"quote": {{ 7 * 7 }} {% raw %}',
    "# heading",
    "1. item",
    "- item",
    "=2+3",
]
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})


def report_of(names, case="case"):
    labels = np.random.default_rng(0).integers(0, len(names) + 1, (2, 8, 8), dtype=np.uint8)
    return evaluate_cases({case: labels}, {case: labels}, class_names=names, settings={"dataset": case, "note": case})


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_is_one_text_in_markdown(text):
    def kinds(tokens):
        return [kind for token in tokens for kind in (token.type, *kinds(token.children or ()))]

    shown = markdown_text(text)
    found = kinds(MARKDOWN.parse(f"| a |\n|---|\n| {shown} |\n"))
    assert found.count("td_open") == 1
    paragraph = kinds(MARKDOWN.parse(shown))
    allowed = {"paragraph_open", "inline", "text", "paragraph_close", "text_special", "entity"}
    assert set(paragraph) <= allowed
    assert not {"html_inline", "link_open", "image", "code_inline", "strong_open"} & set(found)
    assert not re.search(r"\w://|www\.|\x1b", shown)
    assert "\n" not in shown


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_has_the_front_matter_and_headings_it_had(text):
    plain = model_card(SamedConfig("b", ("liver", "x")), report=report_of(("liver", "x")), training={"seed": 1})
    config = SamedConfig(text, ("liver", text))
    card = model_card(config, report=report_of(("liver", text), case=text), training={"seed": text})
    parts, plain_parts = card.split("\n---\n"), plain.split("\n---\n")
    assert len(parts) == len(plain_parts)
    values = yaml.safe_load(parts[0].removeprefix("---\n"))
    assert values.keys() == yaml.safe_load(plain_parts[0].removeprefix("---\n")).keys()
    assert ModelCard(card).data.library_name == "peft"
    kinds = [token.type for token in MARKDOWN.parse(parts[1])]
    assert kinds.count("heading_open") == len(re.findall("^#+ ", plain_parts[1], re.MULTILINE))
    inline = {child.type for token in MARKDOWN.parse(parts[1]) for child in token.children or ()}
    assert not {"html_inline", "link_open", "image"} & inline
    assert "html_block" not in kinds
    assert not {"\x1b", "\x9b", "\u202e"} & set(card)


@pytest.mark.parametrize("text", HOSTILE)
def test_pages_and_terminals_show_no_control_characters(text, tmp_path):
    report = report_of(("liver", text), case=text)
    write_report(report, tmp_path, pictures={})
    for name in ("report.html", "report.md"):
        content = (tmp_path / name).read_text(encoding="utf-8")
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x85"} & set(content)
        assert "<script>alert" not in content.replace("\\<", "")
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(format_table(report))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠"])  # noqa: RUF001
@pytest.mark.parametrize("before", ["", " ", "\u3000", "\xa0"])
def test_spreadsheets_run_no_name(start, before):
    name = f"{before}{start}cmd"
    rows = list(csv.reader(io.StringIO(csv_text(report_of((name,), case=name)), newline="")))
    assert rows[1][0].startswith("'")
    assert rows[1][1].startswith("'")


def test_control_characters_are_visible_in_csv():
    text = csv_text(report_of(("liver",), case="\x1b[31mred\0"))
    assert "\\x1b[31mred\\x00" in text


def test_info_prints_no_control_characters(tmp_path):
    config = SamedConfig("a\x1b[2Jb", ("liver", "\x1b]0;x\x07\x9b"))
    (tmp_path / "samed_config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "adapter_model.safetensors")
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "samed_peft", "info", str(tmp_path), *options]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        assert not {"\x1b", "\x07", "\x9b"} & set(done.stdout)
        if options:
            assert json.loads(done.stdout)["classes"]["2"] == "\x1b]0;x\x07\x9b"
