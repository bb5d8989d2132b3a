"""What README and the docstrings tell people to type exists: flags, files, links."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch_multigpu.sh", ROOT / "multi_gpu_train.slurm",
         *sorted(ROOT.glob("[0-9][0-9]_*.py"))]
LAUNCHERS = "python|torchrun|accelerate launch|./launch_multigpu.sh|sbatch"
COMMAND = re.compile(
    rf"(?:^|\s)({LAUNCHERS})\b([^\n`#]*?)\b(\d\d_\w+\.py)([^\n`#|&>]*)"
)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def documented_commands():
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for launcher, options, script, flags in COMMAND.findall(text):
            command = f"{launcher}{options}{script} {flags.strip()}"
            yield pytest.param(launcher, options, script, flags, id=f"{page.name}: {command}")


@pytest.mark.parametrize(("launcher", "options", "script", "flags"), documented_commands())
def test_every_documented_command_parses(launcher, options, script, flags, monkeypatch):
    options = [*shlex.split(options), script]
    if launcher == "torchrun":
        assert torch.distributed.run.parse_args(options).training_script == script
    elif launcher == "accelerate launch":
        assert launch_command_parser().parse_args(options).training_script == script
    elif launcher == "sbatch":  # its options, then the batch script
        assert options[-2] == "multi_gpu_train.slurm" and all(x[:2] == "--" for x in options[:-2])
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
