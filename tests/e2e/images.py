"""Builds what the Dockerfile describes in a folder, without an engine.

Every step is carried out as it is written, but that the root of the file system is a
folder, and that nobody can be added to the machine. Between two stages the folder is
emptied, save what the later one copies.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP_MAX_S = 400
OWNED = ("build", "opt", "var")
"""The folders of the root that the steps may name."""


@dataclass(frozen=True)
class Step:
    """One instruction, such as ``RUN``, and all that follows it."""

    word: str
    rest: str


def read_steps(text: str) -> list[Step]:
    """Take a Dockerfile apart."""
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    lines = [line.strip() for line in joined.splitlines() if line.strip()]
    return [Step(*re.split(r"\s+", line, maxsplit=1)) for line in lines]


def allowed(path: str, ignore: str) -> bool:
    """Tell whether ``.dockerignore`` lets a file into the build; the last rule wins."""
    verdict = True
    for line in ignore.splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        lets_in = rule.startswith("!")
        if _covers(rule.lstrip("!"), path):
            verdict = lets_in
    return verdict


def _covers(rule: str, path: str) -> bool:
    parts = path.split("/")
    heads = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if rule.startswith("**/"):
        return any(fnmatch.fnmatch(part, rule[3:]) for part in parts)
    return any(
        fnmatch.fnmatch(head, rule) and rule.count("/") == head.count("/")
        for head in heads
    )


@dataclass
class Image:
    """A folder that is to become what the image would hold."""

    root: Path
    python: str
    env: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    """``USER``, ``CMD``, ``HEALTHCHECK`` and so on, as they were last said."""
    _folder: str = "/"

    def build(self) -> None:
        """Carry out every step."""
        steps = read_steps((ROOT / "Dockerfile").read_text())
        starts = [n for n, step in enumerate(steps) if step.word == "FROM"]
        for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
            stage = steps[start:end]
            self._begin([s.rest for s in stage if "--from=" in s.rest])
            for step in stage:
                self._carry_out(step)

    def place(self, path: str) -> Path:
        """Find a path of the image in the folder."""
        return self.root / path.lstrip("/")

    def command(self, name: str) -> list[str]:
        """Read what ``CMD`` or ``HEALTHCHECK`` runs: an array, found along ``PATH``."""
        _, bracket, rest = self.facts[name].partition("[")
        words: list[str] = json.loads(bracket + rest)
        folders = [self.place(path) for path in self.env["PATH"].split(":")]
        program = next(f / words[0] for f in folders if (f / words[0]).exists())
        return [str(program), *words[1:]]

    def _begin(self, copies: list[str]) -> None:
        wanted = [shlex.split(copy)[1:-1] for copy in copies]
        kept = self.root.with_name(f"{self.root.name}-kept")
        for source in (path for paths in wanted for path in paths):
            (kept / source.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            self.place(source).rename(kept / source.lstrip("/"))
        for name in OWNED:
            shutil.rmtree(self.place(name), ignore_errors=True)
        for name in OWNED:
            self.place(name).mkdir(parents=True)
        self.env, self.facts, self._folder = {}, {}, "/"

    def _carry_out(self, step: Step) -> None:
        match step.word:
            case "RUN":
                self._run(step.rest)
            case "COPY":
                self._copy(*shlex.split(step.rest))
            case "ENV":
                pairs = (word.split("=", 1) for word in shlex.split(step.rest))
                self.env |= dict(pairs)
            case "WORKDIR":
                self._folder = step.rest
                self.place(step.rest).mkdir(parents=True, exist_ok=True)
            case _:
                self.facts[step.word] = step.rest

    def _run(self, line: str) -> None:
        tools = self._tools()
        here = str(self.root)
        mapped = re.sub(rf"(?<![\w./-])/(?={'|'.join(OWNED)})", f"{here}/", line)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            ["sh", "-ec", mapped],
            cwd=self.place(self._folder),
            env=env | {"PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=STEP_MAX_S,
        )
        assert done.returncode == 0, f"RUN {line}\n{done.stdout}\n{done.stderr}"

    def _copy(self, *words: str) -> None:
        *sources, target = words
        into = self.root / self._folder.lstrip("/") / target.lstrip("./")
        if sources[0].startswith("--from="):
            kept = self.root.with_name(f"{self.root.name}-kept") / sources[1].lstrip(
                "/"
            )
            kept.rename(self.place(target))
            return
        ignore = (ROOT / ".dockerignore").read_text()
        for source in sources:
            for path in _files_of(source):
                if not allowed(path, ignore):
                    continue
                inside = path.removeprefix(f"{source}/").rpartition("/")
                folder = into / inside[0] if path != source else into
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(
                    ROOT / path, folder / inside[2] if path != source else folder
                )

    def _tools(self) -> Path:
        # What the base image has and this machine has elsewhere, or must not do.
        tools = self.root.with_name(f"{self.root.name}-tools")
        if not tools.exists():
            tools.mkdir()
            scripts = {
                "python": f'exec "{self.python}" "$@"',
                "groupadd": "exit 0",
                "useradd": "exit 0",
            }
            if os.geteuid() != 0:
                scripts["install"] = 'for last; do :; done; exec mkdir -p "$last"'
            for name, script in scripts.items():
                (tools / name).write_text(f"#!/bin/sh\n{script}\n")
                (tools / name).chmod(0o755)
        return tools


def _files_of(source: str) -> list[str]:
    """List the files of the checkout that a COPY names, as the build would see them."""
    start = ROOT / source
    if start.is_file():
        return [source]
    found = (path for path in start.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(ROOT)) for path in found)
