"""Watching a run: rules that read its metrics, raise alarms, and may stop it."""
