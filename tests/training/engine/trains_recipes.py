"""One of several processes. It trains what standard input says, a method, a recipe and a launcher's variables in each
line, and answers with the recipe's path when it is done."""

from __future__ import annotations

import os
import sys

import torch

from diffusion_align.training.engine.accelerator import leave_processes
from diffusion_align.training.methods import config_class
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_config

if __name__ == "__main__":
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        method, recipe, *launched = line.split()
        variables = dict(variable.split("=", 1) for variable in launched)
        os.environ |= variables
        train(load_config(config_class(method), recipe))
        for name in variables:
            del os.environ[name]
        print(recipe, file=answers, flush=True)
    leave_processes()
