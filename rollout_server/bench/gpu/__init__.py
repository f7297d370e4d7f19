"""`python -m rollout_server.bench gpu`: every claim on one GPU, part by part.

command: the options; parts: the list, in the order of worth; runner: each in a process of its own;
child, companion: these processes; findings: what a part tells; table: the Markdown; scale: how
large things are. The others are the parts, `measure(scale, found)` each: they compare what they
measure with something else that they measure too, and check what must hold.
"""
