"""The paper (arXiv 2509.18362): knobs and Eq. 2 in `config.py`, the recursion in `rollout.py`, Eq. 1 in `losses.py`."""
