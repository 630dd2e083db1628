"""Acceptance: what it is (`metrics`), what a head will reach (`simulate`), and how it is shown (`plots`)."""
