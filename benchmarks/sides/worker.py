"""The process of one side: a request a line on its input, an answer a line on its output.

python -m sides.worker MODULE '{"model": "DIR", ...}' THREADS
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_rlsc.run_folder.journal import decode
from sides.measure import measure
from sides.norm import NormBeforeClipping
from sides.work import Setup, Side


def main() -> None:
    # What libraries print goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, setup, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    setup = Setup(**setup | {"model": Path(setup["model"])})
    side: Side = importlib.import_module(f"sides.{module}").build(setup)
    parameters, norm = side.parameters(), NormBeforeClipping()
    answer = {"parameters": sum(parameter.numel() for parameter in parameters)}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        samples = decode(request["samples"].encode())
        step = partial(side.step, samples, request["micro_batch"])
        outcome, cost = measure(step, parameters, setup.device)
        outcome, cost = norm.exact(outcome), norm.without(cost)
        answer = dataclasses.asdict(outcome) | dataclasses.asdict(cost)
        if "save" in request:
            torch.save(side.weights(), request["save"])


if __name__ == "__main__":
    main()
