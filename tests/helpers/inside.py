"""What is inside a server and its parts: the one place of the tests that knows what is private.

For faults and delays that no public call brings about, and for what only vLLM itself can tell.
"""

from pathlib import Path


def engine(server):
    """Of `EngineProtocol`: tests put a method of its out of action, or delay it."""
    return server._engine


def client(server):
    """vLLM's, of this process's engine."""
    return server._engine.client


def output_processor(server):
    """vLLM's, which has the requests that aren't finished."""
    return client(server).output_processor


def chat_tokenizer(server):
    """The one whose template vLLM renders conversations with."""
    return client(server).renderer.get_tokenizer()


def most_at_a_time(server):
    """Requests that vLLM's scheduler runs together."""
    return client(server).vllm_config.scheduler_config.max_num_seqs


def config(server):
    """The `RolloutConfig` that it was attached with."""
    return server._config


def steps(server):
    """The steps that its transitions are made of."""
    return server._lifecycle.steps


def restarts(server):
    """How often its engine was restarted, and may be."""
    return steps(server).restarts


def states(server):
    """The owner of its state, all changes of which go through `move`."""
    return server._box


def sync(server):
    """What `sync_weights` calls."""
    return server._sync


def turn(server):
    """A sync's: others wait for it to end."""
    return sync(server)._turn()


def exporter(sender):
    """Of a `Sender` of weights: what the tensors are exported with."""
    return sender._exporter


def engine_log(server):
    """The file that the engine writes to."""
    return Path(server._folder, "engine.log")


def forget_latest(tree):
    """Have a `TokenTree` know nothing more of its latest call than of the others."""
    tree._newest = type(tree)()._newest
