"""The one loop and what it needs; it knows its guests by ``protocols`` only. Nothing is imported here: configs
pass through.
"""
