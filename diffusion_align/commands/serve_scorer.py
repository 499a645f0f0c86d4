"""``diffusion-align serve-scorer``: a scorer in a process of its own, for runs in others."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from diffusion_align.devices import pick_device
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.serving import ScorerServer
from diffusion_align.rewards.wire import TOKEN

from .options import ServeScorerOptions
from .parsing import scorer_options


def run(options: ServeScorerOptions) -> int:
    """Serve until a signal comes; returns the exit status.

    Raises:
        ValueError: no such scorer, or an address that others reach without a secret.
        OSError: the address is taken, or the weights are not there.
    """
    given = scorer_options(options.options)
    scorer = load_scorer(options.scorer, options.checkpoint, device=pick_device(options.device), **given)
    token = os.environ.get(TOKEN, "")
    with ScorerServer(scorer, options.host, options.port, token, options.batch_size) as server:
        address = f"http://{options.host}:{server.server_port}"
        print(f"{options.scorer} is at {address}: give that as a scorer's name. Ctrl-C ends it.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
