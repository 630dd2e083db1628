"""From prompts to training rows: self-distilled answers."""
