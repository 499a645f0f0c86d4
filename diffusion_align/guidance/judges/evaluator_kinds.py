"""What an evaluator can judge. Nothing heavy is imported here: options and settings name these kinds."""

from __future__ import annotations

from typing import Literal, get_args

#: Kinds of judgements, and what each is trained on (2509.16131, sec. 4).
EvaluatorKind = Literal["alignment", "fidelity", "preference", "task", "value"]
KINDS: tuple[str, ...] = get_args(EvaluatorKind)
