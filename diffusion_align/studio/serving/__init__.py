"""The server: who may ask, what pictures may be seen, and what each page asks for. No torch is imported here."""
