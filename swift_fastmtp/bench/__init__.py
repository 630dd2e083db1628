"""Served models measured: plans, servers, engines, results."""
