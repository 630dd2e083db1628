"""Tables, plots, pages and model cards of what was measured."""
