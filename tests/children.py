"""Processes for tests, alone or two that train together.

They are forked from a server that has imported everything, so that each starts at once.
"""

import multiprocessing
import os
import socket

import torch

from advdpnp.parallel import share, together

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["advdpnp.runs"])


def start(function, *arguments):
    "A process that calls a module's function; one that is still there in the end is killed."
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def _one_of_two(rank, port, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))  # what torchrun sets
    with together("cpu"):
        assert share() == (rank, 2)
        function(*arguments)


def start_two(function, *arguments):
    "Two processes that know one another, as torchrun would start them, and call the same function."
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(_one_of_two, rank, port, function, arguments) for rank in (0, 1)]
