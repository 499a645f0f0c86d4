"""DPO and InPO: learning from pairs of a chosen and a rejected picture."""
