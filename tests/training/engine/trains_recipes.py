"""One of several processes. It does what standard input says in each line and answers with the file's path when it is
done: it trains a method's recipe under a launcher's variables, or takes a command line from a file of JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from diffusion_align.cli import main
from diffusion_align.training.engine import accelerator
from diffusion_align.training.methods import config_class
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_config

if __name__ == "__main__":
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    leave, accelerator.leave_processes = accelerator.leave_processes, lambda: None  # a command's end is not this one's
    for line in sys.stdin:
        method, recipe, *launched = line.split()
        variables = dict(variable.split("=", 1) for variable in launched)
        os.environ |= variables
        if method == "command":
            assert main(json.loads(Path(recipe).read_text())) == 0
        else:
            train(load_config(config_class(method), recipe))
        for name in variables:
            del os.environ[name]
        print(recipe, file=answers, flush=True)
    leave()
