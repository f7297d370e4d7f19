"""What is there when serving begins is left out of garbage collections while anything is served.

A large request makes many objects, and with them a full collection, which looks at all others in
the process too: torch, vLLM and the trainer have millions, and all threads stand still for tenths
of a second.
"""

import gc
import threading

_lock = threading.Lock()
_served = 0


def leave_out() -> None:
    """Collect once, and leave out what remains; `take_in` must follow."""
    global _served
    with _lock:
        _served += 1
        gc.collect()
        gc.freeze()


def take_in() -> None:
    """All is collected again once nothing is served any more."""
    global _served
    with _lock:
        _served -= 1
        if not _served:
            gc.unfreeze()
