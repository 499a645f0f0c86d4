"""Pictures for Compare: one spawned process draws and scores, the server only tells it what."""
