"""Cases that check the forking parent itself."""

import os
import time


def echo(rank: int, world_size: int, word: str) -> list[object]:
    return [rank, world_size, word]


def hang(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(1000)


def die(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(1000)
