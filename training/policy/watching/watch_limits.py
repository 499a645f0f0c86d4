"""How much is needed before a rule can say anything. No imports: settings read them."""

from __future__ import annotations

#: Held-out scorers whose mean is worth a rule: one alone has flaws of its own.
LEAST_HELD_OUT = 2
#: Validation prompts from which the base's spread is known well enough to raise alarms about pictures.
LEAST_PROMPTS = 12
