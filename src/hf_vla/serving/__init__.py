"""A checkpoint behind a websocket, and how to talk to it."""
