"""What README and the docstrings tell people to type exists: flags, files, links."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[0-9][0-9]_*.py"))]
COMMAND = re.compile(
    r"(?:^|\s)(?:python|torchrun|accelerate launch)\b[^\n`]*?\b(\d\d_\w+\.py)([^\n`#|&>]*)"
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def documented_commands():
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for script, flags in COMMAND.findall(text):
            yield pytest.param(script, flags.strip(), id=f"{page.name}: {script} {flags.strip()}")


@pytest.mark.parametrize(("script", "flags"), documented_commands())
def test_every_documented_command_parses(script, flags, monkeypatch):
    spec = importlib.util.spec_from_file_location("lesson", ROOT / script)
    lesson = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(ROOT)
    spec.loader.exec_module(lesson)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags.replace("...", ""))])
    config = lesson.parse_config(lesson.Config, getattr(lesson, "PRESETS", {}))
    assert isinstance(config, lesson.Config)


def test_commands_are_found_in_readme_and_in_every_script():
    pages = {param.id.split(":")[0] for param in documented_commands()}
    assert pages == {page.name for page in PAGES}


def test_relative_links_exist():
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (ROOT / link).exists()] == []
