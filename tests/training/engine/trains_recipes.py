"""One of several processes: it does what it is told, one thing after another, and says when each is done."""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from diffusion_align.cli import main
from diffusion_align.training.engine import accelerator
from diffusion_align.training.methods import config_class
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_config


def serve(told: Connection) -> None:
    """Does what ``told`` says, without end: a method, or "command"; the file with the recipe, or with a command line as
    JSON; variables of a launcher for this one thing, each as NAME=VALUE. Answers with the file."""
    AcceleratorState._reset_state(reset_partial_state=True)  # what this process was forked from was alone
    GradientState._reset_state()
    accelerator.leave_processes = lambda: None  # a command's end is not this one's
    while True:
        what, file, launched = told.recv()
        variables = dict(variable.split("=", 1) for variable in launched)
        os.environ.update(variables)
        if what == "command":
            assert main(json.loads(Path(file).read_text())) == 0
        else:
            train(load_config(config_class(what), file))
        for name in variables:
            del os.environ[name]
        told.send(file)
