"""Goes through the stages of a folder, remembers what became of them (``state.json``), and reports after each."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from echo_rl.errors import ConfigError, EchoError
from echo_rl.utils.result_store import write_json
from scripts.gpu.plan import plan
from scripts.gpu.processes import run_step
from scripts.gpu.report import write_report
from scripts.gpu.sglang_stages import MODES, settings
from scripts.gpu.steps import FAILED, Args, Runner, Stage

TAIL = 15
"""Lines of a failure's log that are shown."""


class Validation:
    def __init__(self, args: Args, runner: Runner = run_step) -> None:
        self.args, self.runner, self.stages, self.out = args, runner, plan(args), args.out.resolve()
        path = self.out / "state.json"
        self.state: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self) -> bool:
        """Whether nothing failed. Raises `ConfigError` where torch sees no GPU, or another than the folder's."""
        for stage in self.stages:
            self.do(stage)
            if stage.name == "environment":
                self._require_gpu()
                for mode in MODES:
                    write_json(self.out / f"sglang-{mode}.json", settings(self.args, mode))
            write_report(self.out, self.machine(), self.stages, self.state)
        return not any(self.state[s.name]["outcome"] in FAILED for s in self.stages)

    def machine(self) -> dict[str, Any]:
        path = self.out / "environment" / "machine.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _require_gpu(self) -> None:
        seen, here = self.state["environment"], self.machine()
        if seen["outcome"] != "done" or not here.get("gpu"):
            raise ConfigError(
                f"torch {here.get('torch')} sees no GPU here (log: {self.out / 'environment.log'}); install a build of "
                "torch for CUDA or ROCm and check nvidia-smi, or see the plan with --dry-run"
            )
        if seen.setdefault("gpu", here["gpu"]) != here["gpu"]:
            raise ConfigError(f"{self.out} is of {seen['gpu']}, this is {here['gpu']}; give another --out")

    def do(self, stage: Stage) -> None:
        """Unless it is done already. A folder of other commands, or one to do again, is begun anew."""
        found, folder = self.state.get(stage.name), self.out / stage.name
        setting = [*stage.lines(), stage.note]
        anew = stage.name in self.args.again or (found is not None and found["setting"] != setting)
        if stage.name != "environment":
            if found and found["outcome"] == "done" and not anew:
                return say(f"{stage.name}: done before")
            if anew:
                shutil.rmtree(folder, ignore_errors=True)
        missing = stage.needs and self.state[stage.needs]["outcome"] != "done"
        reason = stage.skip or (f"{stage.needs} was not done" if missing else "")
        begin = time.monotonic()
        outcome, tail = ("skipped", [reason]) if reason else self._run(stage, folder)
        seconds = round(time.monotonic() - begin, 1)
        fresh = {"outcome": outcome, "seconds": seconds, "tail": tail, "setting": setting}
        self.state[stage.name] = {**(found or {}), **fresh}
        write_json(self.out / "state.json", self.state)
        say(f"{stage.name}: {outcome} {seconds:.0f} s {reason}")

    def _run(self, stage: Stage, folder: Path) -> tuple[str, list[str]]:
        """Its outcome, and of a failure the end of the log. The first failure is the stage's."""
        folder.mkdir(parents=True, exist_ok=True)
        log = self.out / f"{stage.name}.log"
        log.unlink(missing_ok=True)
        limit = 60 * stage.minutes * self.args.patience
        say(f"{stage.name}: at most {limit / 60:.0f} min, log {log}")
        end, outcome, tail = time.monotonic() + limit, "done", []
        for step in stage.steps:
            try:
                code = self.runner(step, log, max(0.0, end - time.monotonic()))
                last = f"exit code {code}"
            except (OSError, EchoError) as error:
                code, last = 1, str(error)
            if code != 0 and outcome == "done":
                outcome, last = ("timed out", f"limit {limit:.0f} s") if code is None else ("failed", last)
                said = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
                tail = [*said, last]
            if outcome == "timed out" or (outcome == "failed" and not stage.thorough):
                break
        return outcome, tail


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
