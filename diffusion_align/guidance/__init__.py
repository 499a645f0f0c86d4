"""Which guidance scale at which step: schedules, tables, and dynamic search with latent evaluators."""
