"""`python -m rollout_server.doctor`: is this installation in order, and what to do if not."""
