"""What the middleware put into the ASGI scope of a request, for those further in."""

# A `Live` session or None: whose the request is.
SESSION = "rollout_session"
# The prefix under which a dialect's clients look for the routes.
SURFACE = "rollout_surface"
# Of a POST: the body, None where a middleware has changed what is in it; that; and how many bytes
# came.
BODY, REQUEST, SIZE = "rollout_body", "rollout_request", "rollout_size"
