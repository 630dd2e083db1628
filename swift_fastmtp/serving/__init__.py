"""Serving: what runs inside the engine that serves the drafts."""
