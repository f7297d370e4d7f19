"""Benchmarks that run on any machine: `python -m rollout_server.bench refit --help`.

Each compares several ways of doing one thing in one run, and writes JSON and a Markdown table.
"""
